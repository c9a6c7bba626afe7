"""What came out: win rates, factual precision, answers before and after PPO, and a model that
answers.

    python eval.py table runs/toy/ppo                       the table of a finished run, once more
    python eval.py chat runs/toy/ppo                        answers what you type
    python eval.py generate runs/toy/ppo --prompt "Who is Mira Brenson?"
    python eval.py generate runs/ppo --input eval.json --output outputs.json --format alpaca_eval
    python eval.py winrate annotations.json                 what an outside judge has said

Three systems answer each evaluation instruction: the reference answers that the data come with, the
SFT model ("before", the policy with its adapter off) and the policy ("after"). Two judges look at
them: the reward model (the proxy that PPO maximised) and, in the toy world, the annotators that the
reward model has learned from (the gold that it stands for). Quote a win rate with its error: at 300
prompts the standard error is 2 to 3 points.

Statistics
* Win rate: the mean over prompts of 1 (win), 1/2 (draw), 0 (loss); paired, one instruction for
  both.
* Standard errors and intervals come from resampling (bootstrap, 1000 times, seeded): of prompts,
  or, where several prompts ask about one person, as in the toy world, of persons with all their
  prompts - answers about one person err together.
* KL is between the models' own distributions (temperature 1), along the answers as sampled.
* Factual precision: supported / stated facts, all answers pooled (FActScore, Min et al., arXiv
  2305.14251), exact in the toy world.
"""
import argparse
import itertools
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch

from data import Tokenizer, prompt_ids, read_rows, text_field
from lora import load_lora
from model import (InputError, fingerprint, generate, load_llama, read_json, read_model_config,
                   read_text, whole_file)
from reward import ActorCritic, assess, build_models, score_responses
from toy import world


# ------------------------------------------------------------------------------------ statistics

def outcomes(ours, theirs):
    """1 (win), 1/2 (draw) or 0 (loss) of each pair of a judge's scores."""
    if any(score != score for score in (*ours, *theirs)):
        raise FloatingPointError("a score is not a number: the judge, or what it judges, is broken")
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def win_rate(ours, theirs):
    """Mean outcome of paired answers; swapping the sides gives 1 - w."""
    return fmean(outcomes(ours, theirs))


def resample(groups, resamples=1000, seed=0):
    """Cluster bootstrap: whole groups are drawn with replacement. groups: a label per row (n) ->
    (resamples, n) float64, how often each row is in each resample. Labels that all differ make it
    the plain bootstrap."""
    number = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(number), (resamples, len(number)), generator=generator)
    ones = torch.ones(picks.shape, dtype=torch.float64)
    times = torch.zeros_like(ones).scatter_add_(1, picks, ones)
    return times[:, [number[g] for g in groups]]


def with_error(value, values):
    """A statistic and its values under resampling -> {"value", "se", "low", "high"}: standard error
    and 95 % percentile interval (Efron 1979); resamples with nothing to divide by are left out."""
    values = values[torch.isfinite(values)]
    if len(values) < 2 or value != value:
        return {"value": value} | dict.fromkeys(("se", "low", "high"), float("nan"))
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "se": values.std().item(), "low": low, "high": high}


def ratio_with_error(pairs, groups):
    """Pooled ratio sum(a) / sum(b) of a pair (a, b) per answer, with its error; nan where there is
    nothing to divide by."""
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    if b.sum() == 0:
        return with_error(float("nan"), b)
    times = resample(groups)                                                     # (resamples, n)
    return with_error((a.sum() / b.sum()).item(), times @ a / (times @ b))


def mean_with_error(values, groups):
    return ratio_with_error([(v, 1) for v in values], groups)


def win_rate_with_error(ours, theirs, groups=None):
    """-> {"value", "se", "low", "high"}; groups: what is resampled together (None: prompts)."""
    return mean_with_error(outcomes(ours, theirs), groups or range(len(ours)))


def count_preferences(preferences):
    """Judgements as alpaca_eval and AlpacaFarm write them -> win rate of output_2, its standard
    error (with n - 1), and the counts.

    1: output_1 is better, 2: output_2, 1.5 or (AlpacaFarm) 0: a draw, between 1 and 2: a leaning,
    which counts as wins - 1 in the win rate. Numbers may be texts; what is none (a judge that
    failed) is left out."""
    numbers = [as_number(p) for p in preferences]
    valid = [1.5 if p == 0 else p for p in numbers if p == 0 or 1 <= p <= 2]
    if len(valid) < 2:
        raise InputError(f"{len(valid)} judgements have a preference between 1 and 2: too few")
    wins = torch.tensor(valid, dtype=torch.float64) - 1
    return {"win_rate": wins.mean().item(), "standard_error": wins.std().item() / len(valid) ** 0.5,
            "n_wins": int((wins > 0.5).sum()), "n_wins_base": int((wins < 0.5).sum()),
            "n_draws": int((wins == 0.5).sum()), "n_total": len(valid),
            "left_out": len(numbers) - len(valid)}


def as_number(x):
    """A number, or a text that is one; anything else is NaN."""
    try:
        return float("nan") if isinstance(x, bool) else float(x)
    except (TypeError, ValueError):
        return float("nan")


# --------------------------------------------------------------------- the reward model's accuracy

def score_pairs(model, pairs, eos_id, micro_batch):
    """Scores and lengths of both answers of each pair, and its flaw -> list of dictionaries."""
    prompts = [p.prompt for p in pairs]
    chosen = score_responses(model, prompts, [p.chosen for p in pairs], eos_id, micro_batch)
    rejected = score_responses(model, prompts, [p.rejected for p in pairs], eos_id, micro_batch)
    return [{"chosen": c, "rejected": r, "flaw": p.flaw,
             "chosen_tokens": len(p.chosen), "rejected_tokens": len(p.rejected)}
            for p, c, r in zip(pairs, chosen.tolist(), rejected.tolist())]


def pair_accuracy(scored):
    """Share of pairs in which the better answer has the higher score; of "the longer one is
    better"; by kind of flaw."""
    def share(rows, suffix=""):
        chosen, rejected = [[s[which + suffix] for s in rows] for which in ("chosen", "rejected")]
        return win_rate(chosen, rejected)

    by_flaw = {}
    for flaw in sorted({s["flaw"] for s in scored} - {""}):
        rows = [s for s in scored if s["flaw"] == flaw]
        by_flaw[flaw] = {"accuracy": share(rows), "pairs": len(rows)}
    return {"pairs": len(scored), "accuracy": share(scored), "by_flaw": by_flaw,
            "longer_wins": share(scored, "_tokens")}


def accuracy_report(a):
    """pair_accuracy as text."""
    text = (f"reward model: {a['accuracy']:.3f} of {a['pairs']} held-out pairs in the right order "
            f"(\"the longer one wins\": {a['longer_wins']:.3f})")
    flaws = [f"{k} {v['accuracy']:.2f} (n {v['pairs']})" for k, v in a["by_flaw"].items()]
    return text + ("\n  by flaw: " + ", ".join(flaws) if flaws else "")


# ------------------------------------------------------------------------ answers, before and after

SYSTEMS = ("reference", "before", "after")


def ppo_settings(folder):
    """What a PPO run was made with, from its config.json -> its settings, paths as seen from here,
    and the content of its inputs: digests of files, fingerprints of models."""
    folder = Path(folder)
    about = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    run = about.get("run", {})
    if run.get("stage") != "ppo" or not (folder / "policy").is_dir():
        raise InputError(f"{folder} holds no finished PPO run: is it in {folder / 'ppo'}?")
    paths = {name: folder / run[name] for name in ("model", "reward")}
    return run | paths, about["content"]


def check_weights(folder, name, found, content):
    """InputError if a run was trained on other weights than its --model or --reward holds now."""
    if found != content[name]:
        raise InputError(f"{folder} was trained with other weights than its --{name} holds now: "
                         "train.py --redo ppo")


def load_run(folder, device="cpu", dtype=torch.float32):
    """The models of a finished PPO run, policy trained -> ActorCritic, RewardModel, Tokenizer."""
    folder = Path(folder)
    run, content = ppo_settings(folder)
    tokenizer = Tokenizer(folder / "policy" / "tokenizer.model")
    banned_ids = tokenizer.banned_ids(read_model_config(run["model"]).vocab_size)
    net, reward_model = build_models(run["model"], run["reward"], device, dtype, banned_ids,
                                     run["lora_rank"], run["lora_alpha"])
    judge = fingerprint(reward_model.trunk, reward_model.adapter_name)
    check_weights(folder, "model", fingerprint(net.ref or net.policy), content)
    check_weights(folder, "reward", judge, content)
    if net.policy_adapter:
        load_lora(net.policy, net.policy_adapter, folder / "policy")
    else:
        net.policy = load_llama(folder / "policy", device)
    return net.eval(), reward_model, tokenizer


def answer(net, prompts, tokenizer, trained=True, **settings):
    """Responses (ids) of the policy, or, with trained=False, of the model that it started from."""
    banned_ids = tokenizer.banned_ids(net.policy.config.vocab_size)
    with net.acting(trained) as model:
        return generate(model, prompts, eos_id=tokenizer.eos_id, banned_ids=banned_ids, **settings)


def evaluate(net, reward_model, tokenizer, rows, micro_batch, **settings):
    """Answers to each row (data.load_eval_rows) before and after training, beside its reference,
    with scores and KL -> one record per row.

    settings: of `generate`; a row's answers depend on the seed and its index alone."""
    if not rows:
        return []
    prompts, eos_id = [row["prompt"] for row in rows], tokenizer.eos_id
    settings |= {"row_ids": [row["index"] for row in rows]}
    answers = {"reference": [row["reference"] for row in rows],
               "before": answer(net, prompts, tokenizer, trained=False, **settings),
               "after": answer(net, prompts, tokenizer, **settings)}
    left_out = ("prompt", "reference", "output")
    records = [{key: row[key] for key in row if key not in left_out} for row in rows]
    for name, responses in answers.items():
        scores = score_responses(reward_model, prompts, responses, eos_id, micro_batch).tolist()
        for record, ids, score, row in zip(records, responses, scores, rows):
            text = row["output"] if name == "reference" else tokenizer.decode_response(ids)
            record[name] = {"text": text, "tokens": len(ids), "finished": ids[-1] == eos_id,
                            "score": score}
    assessed = assess(net, reward_model, prompts, answers["after"], eos_id, micro_batch)
    for record, kl in zip(records, assessed.kl.sum(-1).tolist()):
        record["after"]["kl"] = kl
    return records


def is_toy(records):
    """Whether the toy world's annotators can judge these records."""
    return all(r.get("dataset") == "toy" for r in records)


def judge(records, name):
    """Scores of one system's answers: the annotators' in the toy world, else the reward model's."""
    if not is_toy(records):
        return [r[name]["score"] for r in records]
    return [world.annotator_score(r["instruction"], r[name]["text"], r[name]["finished"])
            for r in records]


def groups_of(records):
    """What is resampled together: in the toy world all prompts about one person."""
    if not is_toy(records):
        return list(range(len(records)))
    return [world.parse(r["instruction"]).person.name for r in records]


def summarise(records):
    """Records of a run -> {system: {quantity: {"value", "se", "low", "high"}}}."""
    judged, groups = {name: judge(records, name) for name in SYSTEMS}, groups_of(records)
    summary = {}
    for name in SYSTEMS:
        answers = [r[name] for r in records]
        s = {}
        for key, said in (("score", "score"), ("tokens", "tokens"), ("eos_rate", "finished")):
            s[key] = mean_with_error([a[said] for a in answers], groups)
        for other in SYSTEMS[:SYSTEMS.index(name)]:
            s[f"win_{other}"] = win_rate_with_error(judged[name], judged[other], groups)
        if name == "after":
            pairs = [(a["kl"], a["tokens"]) for a in answers]
            s["kl_per_token"] = ratio_with_error(pairs, groups)
            s["kl_per_sequence"] = mean_with_error([a["kl"] for a in answers], groups)
        if is_toy(records):
            s["annotator"] = mean_with_error(judged[name], groups)
            s |= facts(records, name, groups)
        summary[name] = s
    return summary


def facts(records, name, groups):
    """Factual precision of a system's answers in the toy world: supported / stated, pooled."""
    pooled = {}
    for record, group in zip(records, groups):
        ratios = world.fact_ratios(record["instruction"], record[name]["text"])
        for key, pair in ratios.items():
            pooled.setdefault(key, []).append((pair, group))
    return {key: ratio_with_error([pair for pair, _ in found], [group for _, group in found])
            for key, found in pooled.items()}


ROWS = (("reward model's score", "score", "{:+.2f}"), ("annotators' score", "annotator", "{:+.2f}"),
        ("win rate against the reference", "win_reference", "{:.1%}"),
        ("win rate against SFT", "win_before", "{:.1%}"),
        ("KL from SFT, nats per token", "kl_per_token", "{:.3f}"),
        ("KL from SFT, nats per answer", "kl_per_sequence", "{:.1f}"),
        ("length, tokens", "tokens", "{:.1f}"), ("answers that end (EOS)", "eos_rate", "{:.1%}"),
        ("facts stated per answer", "facts", "{:.1f}"),
        ("factual precision, famous people", "precision_famous", "{:.1%}"),
        ("factual precision, obscure people", "precision_obscure", "{:.1%}"),
        ("  - attributes that SFT taught", "precision_taught", "{:.1%}"),
        ("  - attributes never taught", "precision_untaught", "{:.1%}"),
        ("  - share of statements never taught", "untaught_share", "{:.1%}"),
        ("answers that state no fact", "no_facts", "{:.1%}"))


def with_se(x, form):
    """value +-standard error; a dash where there is no value."""
    if x is None or x["value"] != x["value"]:
        return "-"
    return f"{form.format(x['value'])} +-{form.format(x['se']).lstrip('+')}"


def table(summary):
    """The summary as text: a row per quantity, a column per system."""
    lines = [f"{'':38}{'reference':>18}{'SFT (before)':>18}{'PPO (after)':>18}"]
    for label, key, form in ROWS:
        if key in summary["after"]:
            cells = [with_se(summary[name].get(key), form) for name in SYSTEMS]
            lines.append(f"{label:38}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def report(folder):
    """Table and side-by-side answers of a run folder that has been evaluated."""
    path = Path(folder) / "eval.json"
    if not path.is_file():
        raise InputError(f"there is no {path}: is it a PPO run, run to its end with --eval_data?")
    records = read_json(path)["records"]
    summary = summarise(records)
    w = summary["after"]["win_before"]
    who = "the simulated annotators" if is_toy(records) else "the reward model itself"
    lines = ["", f"{len(records)} evaluation prompts, judged by {who}; +- is one standard error",
             "", table(summary), "",
             f"PPO against SFT: {w['value']:.1%}, 95 % interval {w['low']:.1%} to {w['high']:.1%}",
             ""]
    for k in (1, 4, 6):                                    # three answers from all over the file
        r = records[len(records) * k // 7]
        lines += [f"> {r['instruction']}", f"  before: {r['before']['text']}",
                  f"  after:  {r['after']['text']}", ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- command line

@contextmanager
def mistakes_in_one_line(program):
    """A user's mistake ends the program with one line on stderr and status 2; a bug keeps its
    traceback. What the terminal's encoding lacks is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (InputError, OSError) as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{program}: error: {e}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is a mistake like any other."""

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def torch_dtype(name, device):
    """Of a --dtype; auto is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    return getattr(torch, name)


def load_answering(folder, adapter=None, tokenizer=None, dtype="auto"):
    """A policy that can answer: of a PPO run, or a model folder, perhaps with a PEFT folder's
    adapter on it -> ActorCritic, Tokenizer."""
    base, content = Path(folder), None
    if (base / "policy").is_dir():
        run, content = ppo_settings(folder)
        base = base / "policy"
        tokenizer = tokenizer or base / "tokenizer.model"
        if run["lora_rank"]:
            adapter, base = adapter or base, run["model"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_llama(base, device, torch_dtype(dtype, device))
    if content and adapter:
        check_weights(folder, "model", fingerprint(model), content)
    tokenizer = Tokenizer(tokenizer or base / "tokenizer.model")
    tokenizer.check_model(base, model.config.vocab_size)
    if adapter:
        load_lora(model, "policy", adapter)
    return ActorCritic(model, "policy" if adapter else None), tokenizer


def answer_rows(args, net, tokenizer, rows, where, turn=0):
    """Texts answering rows of instruction and input, in their order. A row's answer depends on the
    arguments and its place in the list alone; it ends early where there are no positions left."""
    prompts = [prompt_ids(tokenizer, row, f"{where}, row {i}") for i, row in enumerate(rows)]
    room = net.policy.config.max_seq_len
    limits = [min(args.max_new_tokens, room - len(prompt)) for prompt in prompts]
    answers = answer(net, prompts, tokenizer, max_new_tokens=limits, temperature=args.temperature,
                     top_p=args.top_p, seed=f"{args.seed} {turn}", batch_size=32)
    return [tokenizer.decode_response(ids) for ids in answers]


def formatted(row, text, form, generator):
    """A row and its answer as the judges' programs read them."""
    if form == "factscore":
        return {"topic": row["topic"], "output": text}
    if form == "alpaca_eval":
        instruction = row["instruction"]
        if row.get("input"):
            instruction += "\n\n" + row["input"]
        return {"instruction": instruction, "output": text, "generator": generator}
    asked = {"instruction": row["instruction"], "input": row.get("input", "")}
    if form == "alpacafarm":
        return asked | {"output_1": row["output"], "output_2": text}
    return asked | {"output": text}


def instructions(path, form):
    """Rows to answer; factscore: a file of names, one a line, each asked for as FActScore does."""
    if form == "factscore":
        names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
        return [{"topic": name, "instruction": f"Tell me a bio of {name}."} for name in names]
    rows = read_rows(path)
    for i, row in enumerate(rows):
        if form == "alpacafarm":
            text_field(row, "output", f"{path}, row {i} (output_1 is the reference's)")
    return rows


def command_generate(args):
    if args.output and (args.output == args.input or not args.input
                        or not Path(args.output).parent.is_dir()):
        raise InputError(f"cannot write {args.output}: its folder does not exist, it is --input, "
                         "or there is no --input")
    rows = [{"instruction": args.prompt}]
    if args.input:
        rows = instructions(args.input, args.format)
    texts = answer_rows(args, *load_answering(args.run, args.adapter, args.tokenizer), rows,
                        args.input or "--prompt")
    if not args.input:
        return print(texts[0])
    name = args.generator or Path(args.run).resolve().name
    rows = [formatted(row, text, args.format, name) for row, text in zip(rows, texts)]
    content = json.dumps(rows, indent=1, ensure_ascii=False)
    if args.format == "factscore":
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if not args.output:
        return print(content)
    with whole_file(args.output) as temporary:
        temporary.write_text(content + "\n", encoding="utf-8")


def command_chat(args):
    net, tokenizer = load_answering(args.run, args.adapter, args.tokenizer)
    print("An instruction a line; each is answered for itself. Ctrl-D ends.", file=sys.stderr)
    for turn in itertools.count():
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        rows = [{"instruction": text}] if text.strip() else []
        print(*answer_rows(args, net, tokenizer, rows, "your line", turn), "", sep="\n")


def command_winrate(args):
    c = count_preferences([row.get("preference") for row in read_rows(args.file)])
    reach = 1.96 * c["standard_error"]
    low, high = c["win_rate"] - reach, c["win_rate"] + reach
    print(f"output_2 wins {c['win_rate']:.2%} +-{c['standard_error']:.2%} (95 % interval {low:.1%} "
          f"to {high:.1%}) of {c['n_total']}: {c['n_wins']} wins, {c['n_wins_base']} losses, "
          f"{c['n_draws']} draws; {c['left_out']} without a judgement left out")


def add_answering(p):
    """Arguments of the commands that let a policy answer."""
    p.add_argument("run", metavar="RUN", help="PPO run such as runs/toy/ppo, or a model folder")
    p.add_argument("--adapter", help="a PEFT folder: an adapter on the model folder RUN")
    p.add_argument("--tokenizer", help="sentencepiece file (default: tokenizer.model of RUN)")
    p.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")
    p.add_argument("--top_p", type=float, default=1.0, help="mass of the nucleus (1: no nucleus)")
    p.add_argument("--max_new_tokens", type=int, default=300, help="longest answer (300)")
    p.add_argument("--seed", type=int, default=0)


def build_parser():
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, help):
        p = commands.add_parser(name, help=help, allow_abbrev=False)
        p.set_defaults(command=function)
        return p

    p = command("table", lambda args: print(report(args.run)), "the table of a finished run")
    p.add_argument("run", metavar="RUN", help="PPO run folder, such as runs/toy/ppo")
    add_answering(command("chat", command_chat, "answer instructions that you type"))
    p = command("generate", command_generate, "answer one instruction or a file of them")
    add_answering(p)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one instruction")
    source.add_argument("--input", help="JSON rows of instruction, input; factscore: names")
    p.add_argument("--output", help="file to write (default: print)")
    p.add_argument("--format", choices=("plain", "alpaca_eval", "alpacafarm", "factscore"),
                   default="plain", help="what is written of --input's answers")
    p.add_argument("--generator", help="the model's name in alpaca_eval's rows (default: RUN's)")
    p = command("winrate", command_winrate, "win rate of output_2 over output_1")
    p.add_argument("file", metavar="FILE", help="alpaca_eval's or AlpacaFarm's annotations")
    return parser


def main(argv=None):
    with mistakes_in_one_line("eval.py"):
        args = build_parser().parse_args(argv)
        args.command(args)


if __name__ == "__main__":
    main()
