"""Best-of-n: of n answers of the SFT model, the one that the reward model likes best.

    python toy/study.py frontier && python toy/best_of_n.py

No policy is trained. How far it goes from SFT is not measured but bounded: the KL of an answer is
at most log n - (n - 1) / n (Beirami and others, arXiv 2401.01879), so it may lie further left than
it is drawn. SFT and reward model are those of the frontier's first three seeds, and so are the
instructions and the temperature. Outcomes go to toy/best_of_n.jsonl, as toy/study.py's do.
"""
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import load_eval_rows, read_rows  # noqa: E402
from eval import Parser, answer, load_run, mistakes_in_one_line, summarise  # noqa: E402
from model import read_json  # noqa: E402
from reward import score_responses  # noqa: E402
from toy.study import TEST, append, short  # noqa: E402

SEEDS, LARGEST = (10, 11, 12), 64


def best_of_n(folder, seed, data=TEST):
    """Outcomes for n = 1, 2, 4, .. LARGEST, from the models and the evaluation of a PPO run."""
    net, reward_model, tokenizer = load_run(folder)
    rows = load_eval_rows(data, tokenizer, net.policy.config.max_seq_len, 64)
    records, prompts = read_json(folder / "eval.json")["records"], [row["prompt"] for row in rows]
    for record in records:
        record["after"] = {"score": -math.inf}
    for n in range(1, LARGEST + 1):
        answers = answer(net, prompts, tokenizer, trained=False, temperature=1.0,
                         max_new_tokens=64, batch_size=128, seed=f"{seed} best of n {n}",
                         row_ids=[row["index"] for row in rows])
        scores = score_responses(reward_model, prompts, answers, tokenizer.eos_id, 32).tolist()
        for record, ids, score in zip(records, answers, scores):
            if score > record["after"]["score"]:
                record["after"] = {"text": tokenizer.decode_response(ids), "tokens": len(ids),
                                   "finished": ids[-1] == tokenizer.eos_id, "score": score}
            record["after"]["kl"] = math.log(n) - (n - 1) / n
        if n & (n - 1) == 0:
            yield {"variant": f"best of n, {n}", "seed": seed,
                   "ppo": short(summarise(records)["after"])}


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", default="runs/study", help="run folders of toy/study.py frontier")
    parser.add_argument("--data", default=str(ROOT / "toy" / "best_of_n.jsonl"), help="outcomes")
    with mistakes_in_one_line("best_of_n.py"):
        args = parser.parse_args(argv)
        lines = read_rows(args.data) if Path(args.data).is_file() else []
        for seed in sorted(set(SEEDS) - {line["seed"] for line in lines}):
            folder = Path(args.runs) / f"kl_in_the_reward_0.1_seed{seed}" / "ppo"
            for line in list(best_of_n(folder, seed)):
                append(args.data, line)
            print(f"seed {seed}: done", flush=True)


if __name__ == "__main__":
    main()
