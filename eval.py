"""What came out: answers before and after PPO, win rates, factual precision, the reward model's accuracy.

    python eval.py table runs/toy/ppo                       the table of a finished run, once more
    python eval.py generate runs/toy/ppo --prompt "Who is Mira Brenson?"
    python eval.py generate runs/toy/ppo --input questions.json --output answers.json

Three systems answer each evaluation instruction: the reference answers that the data come with, the SFT model ("before",
the policy with its adapter off) and the policy ("after"). Two judges look at them: the reward model (the proxy that PPO
maximised) and, in the toy world, the annotators that the reward model has learned from (the gold that it stands for).
Quote a win rate with its error: at 300 prompts the standard error is about 2.5 points.

Statistics
* Win rate: the mean over prompts of 1 (win), 1/2 (draw), 0 (loss); paired, both answers to the same instruction.
* Standard errors and intervals come from resampling prompts (bootstrap, 1000 times, seeded).
* Factual precision: supported / stated facts, all answers pooled (FActScore, Min et al., arXiv 2305.14251), exact here.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from data import Tokenizer, load_prompts
from model import generate, read_json, read_model_config
from reward import assess, build_models, load_policy, score_responses
from toy import world


# ------------------------------------------------------------------------------------------------------ statistics

def win_rate(ours, theirs):
    """Mean of 1 for a win, 1/2 for a draw, 0 for a loss; ours, theirs: judge's scores of paired answers. Swapping them
    gives 1 - w."""
    return mean(outcomes(ours, theirs))


def outcomes(ours, theirs):
    """1, 1/2 or 0 for each pair."""
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def mean(x):
    return sum(x) / len(x)


def bootstrap(parts, statistic, resamples=1000, seed=0):
    """Standard error and 95 % interval of statistic(sums of the columns) under resampling of rows.

    parts: (n rows, k numbers); statistic maps column means (resamples, k) to (resamples,). Percentile interval (Efron 1979).
    """
    x = torch.tensor(parts, dtype=torch.float64)
    picks = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(seed))
    values = statistic(x[picks].mean(1))
    values = values[torch.isfinite(values)]
    if len(values) < 2:
        return float("nan"), (float("nan"), float("nan"))
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.std().item(), (low, high)


def win_rate_with_error(ours, theirs):
    """-> {"value", "se", "low", "high"}"""
    results = outcomes(ours, theirs)
    se, (low, high) = bootstrap([[r] for r in results], lambda m: m[:, 0])
    return {"value": mean(results), "se": se, "low": low, "high": high}


def ratio_with_error(pairs):
    """Pooled ratio sum(a) / sum(b) of (a, b) per answer, with its error; value nan where there is nothing to divide by."""
    total = sum(b for _, b in pairs)
    se, (low, high) = bootstrap(pairs, lambda m: m[:, 0] / m[:, 1]) if total else (float("nan"), (float("nan"),) * 2)
    return {"value": sum(a for a, _ in pairs) / total if total else float("nan"), "se": se, "low": low, "high": high}


# ---------------------------------------------------------------------------------------- the reward model's accuracy

def score_pairs(model, pairs, eos_id, micro_batch):
    """Scores of both answers of each pair, and what is known of the pair. -> list of dictionaries"""
    prompts = [p.prompt for p in pairs]
    chosen, rejected = (score_responses(model, prompts, answers, eos_id, micro_batch).tolist()
                        for answers in ([p.chosen for p in pairs], [p.rejected for p in pairs]))
    return [{"chosen": c, "rejected": r, "chosen_tokens": len(p.chosen), "rejected_tokens": len(p.rejected),
             "flaw": p.row.get("flaw", "")} for p, c, r in zip(pairs, chosen, rejected)]


def pair_accuracy(scored):
    """Share of pairs in which the better answer has the higher score; of "the longer one is better"; by kind of flaw."""
    accuracy = lambda rows: win_rate([s["chosen"] for s in rows], [s["rejected"] for s in rows])
    flaws = sorted({s["flaw"] for s in scored if s["flaw"]})
    by_flaw = {flaw: [s for s in scored if s["flaw"] == flaw] for flaw in flaws}
    return {"pairs": len(scored), "accuracy": accuracy(scored),
            "longer_wins": win_rate([s["chosen_tokens"] for s in scored], [s["rejected_tokens"] for s in scored]),
            "by_flaw": {flaw: {"accuracy": accuracy(rows), "pairs": len(rows)} for flaw, rows in by_flaw.items()}}


def accuracy_report(a):
    lines = [f"reward model: {a['accuracy']:.3f} of {a['pairs']} held-out pairs in the right order "
             f"(\"the longer one wins\": {a['longer_wins']:.3f})"]
    if a["by_flaw"]:
        lines.append("  by flaw: " + ", ".join(f"{k} {v['accuracy']:.2f} (n {v['pairs']})" for k, v in a["by_flaw"].items()))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- a run

def load_run(folder, device="cpu", dtype=torch.float32):
    """The four models of a finished PPO run, with its policy. -> ActorCritic, RewardModel, Tokenizer"""
    folder = Path(folder)
    if not (folder / "policy").is_dir():
        raise FileNotFoundError(f"{folder} holds no finished PPO run: expected a folder policy in it")
    run = read_json(folder / "config.json").get("run") or {}
    if run.get("stage") != "ppo":
        raise ValueError(f"{folder}/config.json does not describe a PPO run")
    tokenizer = Tokenizer(folder / "policy" / "tokenizer.model")
    model, reward = folder / run["model"], folder / run["reward"]
    banned_ids = tokenizer.banned_ids(read_model_config(model).vocab_size)
    net, reward_model = build_models(model, reward, device, dtype, banned_ids, run["lora_rank"], run["lora_alpha"])
    load_policy(net, folder / "policy")
    return net.eval(), reward_model.eval(), tokenizer


def answer(net, prompts, tokenizer, trained=True, **settings):
    """Responses (ids) of the policy, or, with trained=False, of the model that it started from."""
    settings |= {"eos_id": tokenizer.eos_id, "banned_ids": tokenizer.banned_ids(net.policy.config.vocab_size)}
    with net.acting(trained) as model:
        return generate(model, prompts, **settings)


def evaluate(net, reward_model, tokenizer, rows, row_ids, max_new_tokens, temperature, seed, micro_batch):
    """Answers to each row before and after training, beside its reference, with scores and KL. -> one record per row.

    rows: as data.load_eval_rows gives them. A row's answers depend on (seed, row id) alone, not on the rows beside it.
    """
    if not rows:
        return []
    prompts = [row["prompt"] for row in rows]
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=f"{seed} evaluation", row_ids=row_ids)
    room = net.policy.config.max_seq_len
    answers = {"reference": [tokenizer.encode_response(row["output"])[:room - len(row["prompt"])] for row in rows],
               "before": answer(net, prompts, tokenizer, trained=False, **settings),
               "after": answer(net, prompts, tokenizer, **settings)}
    scores = {k: score_responses(reward_model, prompts, ids, tokenizer.eos_id, micro_batch).tolist()
              for k, ids in answers.items()}
    kl = assess(net, reward_model, prompts, answers["after"], tokenizer.eos_id, micro_batch).kl.sum(-1).tolist()
    records = []
    for i, row in enumerate(rows):
        record = {k: row[k] for k in row if k not in ("prompt", "output")}
        for name, ids in answers.items():
            text = row["output"] if name == "reference" else tokenizer.decode_response(ids[i])
            record[name] = {"text": text, "tokens": len(ids[i]), "finished": ids[i][-1] == tokenizer.eos_id, "score": scores[name][i]}
        record["after"]["kl"] = kl[i]
        records.append(record)
    return records


# ------------------------------------------------------------------------------------------------------- the table

SYSTEMS = ("reference", "before", "after")


def is_toy(records):
    """Whether the toy world's annotators can judge these records."""
    return all(r.get("dataset") == "toy" for r in records)


def check_rows(rows, path):
    """Rows that say dataset "toy" are judged by the toy world's annotators, who have to understand each instruction."""
    foreign = [r for r in rows if r.get("dataset") == "toy" and world.parse(r["instruction"]) is None]
    if foreign:
        raise ValueError(f"{path}: the toy world's annotators do not know the instruction {foreign[0]['instruction']!r}")


def judge(records, name):
    """The judge's scores of one system's answers: the annotators' in the toy world, else the reward model's."""
    if is_toy(records):
        return [world.annotator_score(r["instruction"], r[name]["text"], r[name]["finished"]) for r in records]
    return [r[name]["score"] for r in records]


def summarise(records):
    """Records of a run -> {system: {quantity: number, or {"value", "se", "low", "high"}}}."""
    judged = {name: judge(records, name) for name in SYSTEMS}
    summary = {}
    for name in SYSTEMS:
        answers = [r[name] for r in records]
        s = {"score": mean([a["score"] for a in answers]),
             "tokens": mean([a["tokens"] for a in answers]), "eos_rate": mean([a["finished"] for a in answers])}
        if name != "reference":
            s["win_reference"] = win_rate_with_error(judged[name], judged["reference"])
        if name == "after":
            s["win_before"] = win_rate_with_error(judged["after"], judged["before"])
            s["kl_per_token"] = sum(a["kl"] for a in answers) / sum(a["tokens"] for a in answers)
            s["kl_per_sequence"] = mean([a["kl"] for a in answers])
        if is_toy(records):
            s |= {"annotator": mean(judged[name])} | facts(records, name)
        summary[name] = s
    return summary


def facts(records, name):
    """Factual precision of a system's answers in the toy world: by fame, and by what the demonstrations taught."""
    counts = [world.check_facts(r["instruction"], r[name]["text"]) for r in records]
    famous = [world.parse(r["instruction"]).person.famous for r in records]
    found = {"facts": mean([c.stated for c in counts]), "no_facts": mean([c.stated == 0 for c in counts])}
    for key, fame in (("famous", True), ("obscure", False)):
        group = [c for c, f in zip(counts, famous) if f == fame]
        found[f"precision_{key}"] = ratio_with_error([(c.supported, c.stated) for c in group])
    group = [c for c, f in zip(counts, famous) if not f]
    found["precision_taught"] = ratio_with_error([(c.taught_supported, c.taught_stated) for c in group])
    found["precision_untaught"] = ratio_with_error([(c.supported - c.taught_supported, c.stated - c.taught_stated) for c in group])
    found["untaught_share"] = ratio_with_error([(c.stated - c.taught_stated, c.stated) for c in group])
    return found


ROWS = (("reward model's score", "score", "{:+.2f}"), ("annotators' score", "annotator", "{:+.2f}"),
        ("win rate against the reference", "win_reference", "{:.1%}"), ("win rate against SFT", "win_before", "{:.1%}"),
        ("KL from SFT, nats per token", "kl_per_token", "{:.3f}"), ("KL from SFT, nats per answer", "kl_per_sequence", "{:.1f}"),
        ("length, tokens", "tokens", "{:.1f}"), ("answers that end (EOS)", "eos_rate", "{:.1%}"),
        ("facts stated per answer", "facts", "{:.1f}"), ("factual precision, famous people", "precision_famous", "{:.1%}"),
        ("factual precision, obscure people", "precision_obscure", "{:.1%}"),
        ("  - attributes that SFT taught", "precision_taught", "{:.1%}"),
        ("  - attributes never taught", "precision_untaught", "{:.1%}"),
        ("  - share of statements never taught", "untaught_share", "{:.1%}"),
        ("answers that state no fact", "no_facts", "{:.1%}"))


def table(summary):
    """The summary as text: a row per quantity, a column per system, standard errors behind +-."""
    def cell(name, key, form):
        x = summary[name].get(key)
        if isinstance(x, dict):
            return f"{form.format(x['value'])} +-{form.format(x['se'])}" if x["value"] == x["value"] else "none stated"
        return "" if x is None else form.format(x)

    lines = [f"{'':38}{'reference':>18}{'SFT (before)':>18}{'PPO (after)':>18}"]
    for label, key, form in ROWS:
        if any(key in summary[name] for name in SYSTEMS):
            lines.append(f"{label:38}" + "".join(f"{cell(name, key, form):>18}" for name in SYSTEMS))
    return "\n".join(lines)


def report(folder):
    """Table and side-by-side answers of a run folder that has been evaluated."""
    path = Path(folder) / "eval.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no eval.json: run train.py --stage ppo with --eval_data")
    records = read_json(path)["records"]
    summary = summarise(records)
    w = summary["after"]["win_before"]
    judge_name = "the simulated annotators" if is_toy(records) else "the reward model itself, which PPO has maximised"
    lines = ["", f"{len(records)} evaluation prompts, judged by {judge_name}; +- is one standard error", "", table(summary), "",
             f"PPO against SFT: {w['value']:.1%}, 95 % interval {w['low']:.1%} to {w['high']:.1%}", ""]
    for r in [records[len(records) * k // 7] for k in (1, 4, 6)]:
        lines += [f"> {r['instruction']}", f"  before: {r['before']['text']}", f"  after:  {r['after']['text']}", ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- command line

def command_generate(args):
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    net, _, tokenizer = load_run(args.run, device, dtype)
    if args.prompt is not None:
        rows = [{"instruction": args.prompt, "input": ""}]
        source = "--prompt"
    else:
        source, rows = args.input, None
    prompts, rows, _ = load_prompts(source, tokenizer, rows=rows)
    responses = answer(net, prompts, tokenizer, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    texts = [tokenizer.decode_response(r) for r in responses]
    if args.output:
        answers = [{"instruction": row["instruction"], "input": row.get("input", ""), "output": text} for row, text in zip(rows, texts)]
        Path(args.output).write_text(json.dumps(answers, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        print("\n\n".join(texts))


def command_table(args):
    for folder in args.runs:
        print(folder)
        print(report(folder))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser("table", help="the table of finished runs", allow_abbrev=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="PPO run folder, such as runs/toy/ppo")
    p.set_defaults(command=command_table)
    p = commands.add_parser("generate", help="answer instructions with a run's policy", allow_abbrev=False)
    p.add_argument("run", metavar="RUN", help="PPO run folder, such as runs/toy/ppo")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one instruction")
    source.add_argument("--input", help="JSON rows of instruction, input")
    p.add_argument("--output", help="write JSON rows of instruction, input, output (default: print)")
    p.add_argument("--max_new_tokens", type=int, default=100)
    p.add_argument("--temperature", type=float, default=0.7)
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(command=command_generate)
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except (ValueError, OSError) as e:
        print(f"eval.py: error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
