"""What came out: answers before and after PPO, win rates, factual precision, the reward model's accuracy.

    python eval.py table runs/toy/ppo                       the table of a finished run, once more
    python eval.py figures runs/toy/ppo                     pictures of runs,
                                                            or their numbers where matplotlib is not installed
    python eval.py generate runs/toy/ppo --prompt "Who is Mira Brenson?"
    python eval.py generate runs/toy/ppo --input questions.json --output answers.json
    python eval.py chat runs/toy/ppo                        answers what you type
    python eval.py export runs/ppo --format alpaca_eval --input eval.json --output outputs.json
    python eval.py winrate annotations.json                 what an outside judge has said
    python eval.py recover llama-7b sft10k-wdiff sft10k     a released weight diff

Three systems answer each evaluation instruction: the reference answers that the data come with, the SFT model
("before", the policy with its adapter off) and the policy ("after"). Two judges look at them: the reward model (the
proxy that PPO maximised) and, in the toy world, the annotators that the reward model has learned from (the gold that it
stands for). Quote a win rate with its error: at 300 prompts the standard error is 2 to 3 points.

Statistics
* Win rate: the mean over prompts of 1 (win), 1/2 (draw), 0 (loss); paired, both answers to the same instruction.
* Standard errors and intervals come from resampling (bootstrap, 1000 times, seeded): of prompts, or, where several
  prompts ask about one person, as in the toy world, of persons with all their prompts - answers about one person err
  together.
* Win rate at equal length: a logistic fit of the outcome on the difference in length, read off at difference 0 (as in
  length-controlled AlpacaEval, Dubois et al., arXiv 2404.04475).
* Several seeds: the mean over seeds; its error holds the spread between prompts and that between seeds (over_seeds).
* Factual precision: supported / stated facts, all answers pooled (FActScore, Min et al., arXiv 2305.14251), exact here.
"""
import argparse
import contextlib
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy
import torch

from data import Tokenizer, load_prompts, read_rows, text_field
from lora import base_folder, load_lora, lora_parameters, merge_lora
from model import (fingerprint, generate, keyed_seed, parse_json, read_json, read_model_config, read_text, save_llama,
                   write_json)
from reward import (ActorCritic, assess, build_models, check_new_folder, is_adapter, load_policy, load_reward_model,
                    load_trunk, recover, score_responses)
from toy import world


# ------------------------------------------------------------------------------------------------------ statistics

def win_rate(ours, theirs):
    """Mean of 1 for a win, 1/2 for a draw, 0 for a loss; ours, theirs: judge's scores of paired answers. Swapping them
    gives 1 - w."""
    return mean(outcomes(ours, theirs))


def outcomes(ours, theirs):
    """1, 1/2 or 0 for each pair. ValueError where a score is NaN, which is neither better nor worse."""
    if any(score != score for score in (*ours, *theirs)):
        raise ValueError("a score is not a number (NaN): the judge, or what it judges, is broken")
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def mean(x):
    return sum(x) / len(x)


def resample(groups, resamples=1000, seed=0):
    """Cluster bootstrap: whole groups are drawn with replacement. groups: one label per row (n) -> (resamples, n)
    float64, how often each row is in each resample. Labels that are all different make it the plain bootstrap."""
    number = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    picks = torch.randint(len(number), (resamples, len(number)), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(picks.shape, dtype=torch.float64).scatter_add_(
        1, picks, torch.ones(picks.shape, dtype=torch.float64))
    return times[:, [number[g] for g in groups]]


def with_error(value, values):
    """A statistic and its values under resampling -> {"value", "se", "low", "high"}: standard error and 95 % percentile
    interval (Efron 1979); resamples in which there is nothing to divide by are left out."""
    values = values[torch.isfinite(values)]
    if len(values) < 2 or value != value:
        return {"value": value} | dict.fromkeys(("se", "low", "high"), float("nan"))
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "se": values.std().item(), "low": low, "high": high}


def ratio_with_error(pairs, groups=None):
    """Pooled ratio sum(a) / sum(b) of (a, b) per answer, with its error;
    value nan where there is nothing to divide by."""
    a, b = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T
    if b.sum() == 0:
        return with_error(float("nan"), b)
    times = resample(groups or range(len(pairs)))                                 # (resamples, n)
    return with_error((a.sum() / b.sum()).item(), times @ a / (times @ b))


def win_rate_with_error(ours, theirs, groups=None):
    """-> {"value", "se", "low", "high"}"""
    return ratio_with_error([(r, 1) for r in outcomes(ours, theirs)], groups)


def win_rate_at_equal_length(ours, theirs, our_lengths, their_lengths, groups=None):
    """Win rate that the fit P(win) = sigmoid(a + b (our length - their length)) gives at difference 0: sigmoid(a), with
    its error. A draw is half a win and half a loss. How far the fit can be trusted is the data's matter: where no two
    answers are about equally long, it is an extrapolation."""
    y = torch.tensor(outcomes(ours, theirs), dtype=torch.float64)
    x = torch.tensor([p - q for p, q in zip(our_lengths, their_lengths, strict=True)], dtype=torch.float64)
    x = x / x.square().mean().sqrt().clamp(min=1e-12)
    times = torch.cat([torch.ones(1, len(y)), resample(groups or range(len(y)))])
    values = torch.sigmoid(logistic_fit(x, y, times)[:, 0])
    return with_error(values[0].item(), values[1:])


def logistic_fit(x, y, weights, prior=0.1, iterations=20):
    """(a, b) of sigmoid(a + b x), by Newton's method, for each row of weights: x, y (n,), weights (m, n) -> (m, 2).

    The prior N(0, 1 / prior^2) on both keeps them finite where every outcome is a win, or length decides them all."""
    X = torch.stack([torch.ones_like(x), x], dim=1)                               # (n, 2)
    XX = (X[:, :, None] * X[:, None]).flatten(1)                                  # (n, 4)
    theta = torch.zeros(len(weights), 2, dtype=X.dtype)
    for _ in range(iterations):
        p = torch.sigmoid(theta @ X.T)                                            # (m, n)
        gradient = (weights * (y - p)) @ X - prior ** 2 * theta
        hessian = ((weights * p * (1 - p)) @ XX).view(-1, 2, 2) + prior ** 2 * torch.eye(2, dtype=X.dtype)
        step = torch.linalg.solve(hessian, gradient)
        # far from the optimum Newton overshoots
        theta = theta + step * (2 / step.norm(dim=1, keepdim=True)).clamp(max=1)
    return theta


def over_seeds(results):
    """One quantity from several seeds, each {"value", "se"} of its own
    -> the mean over seeds, with the error of both spreads.

        se^2 = s^2 / K + mean(se_k^2)       s: standard deviation between the K seeds,
                                            se_k: that of prompts within a seed

    The prompts are the same for every seed, so that their part does not shrink with K. (s holds a share of the noise of
    sampling that se_k holds as well: slightly conservative.) The interval is Student's, with Satterthwaite's degrees of
    freedom: two or three seeds say little about their own spread. One seed:
    no spread between seeds is known, and none added.
    """
    # (a seed that states no facts has no precision)
    results = [r for r in results if r["value"] == r["value"]] or results
    values, K = torch.tensor([r["value"] for r in results], dtype=torch.float64), len(results)
    prompts = mean([r["se"] ** 2 for r in results])
    seeds = values.var().item() / K if K > 1 else 0.0
    se, value = (prompts + seeds) ** 0.5, values.mean().item()
    reach = (student_quantile((K - 1) * ((seeds + prompts) / seeds) ** 2) if seeds > 0 else 1.96) * se
    return {"value": value, "se": se, "low": value - reach, "high": value + reach, "seeds": K}


def student_quantile(df):
    """97.5 % quantile of Student's t. With t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1),
    summed on a grid."""
    angle = torch.linspace(0, math.pi / 2, 100001, dtype=torch.float64)
    mass = (angle.cos().clamp(min=0) ** (min(df, 1e4) - 1)).cumsum(0)
    return min(df, 1e4) ** 0.5 * math.tan(angle[torch.searchsorted(mass, 0.95 * mass[-1])])


# ---------------------------------------------------------------------------------------- the reward model's accuracy

def score_pairs(model, pairs, eos_id, micro_batch):
    """Scores of both answers of each pair, and what is known of the pair. -> list of dictionaries"""
    prompts = [p.prompt for p in pairs]
    chosen, rejected = (score_responses(model, prompts, answers, eos_id, micro_batch).tolist()
                        for answers in ([p.chosen for p in pairs], [p.rejected for p in pairs]))
    return [{"chosen": c, "rejected": r, "chosen_tokens": len(p.chosen), "rejected_tokens": len(p.rejected),
             "flaw": str(p.row.get("flaw") or "")} for p, c, r in zip(pairs, chosen, rejected)]


def pair_accuracy(scored):
    """Share of pairs in which the better answer has the higher score; of "the longer one is better";
    by kind of flaw."""
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
        lines.append("  by flaw: " + ", ".join(f"{k} {v['accuracy']:.2f} (n {v['pairs']})"
                                               for k, v in a["by_flaw"].items()))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- a run

def run_settings(folder):
    """The settings in a run folder's config.json; {} where that describes no run (but a model, say)."""
    about = read_json(Path(folder) / "config.json")
    run = about.get("run") if isinstance(about, dict) else None
    return run if isinstance(run, dict) else {}


def ppo_settings(folder):
    """run_settings of a PPO run. ValueError if it is none."""
    run, needed = run_settings(folder), {"model": str, "reward": str, "lora_rank": int, "lora_alpha": (int, float),
                                         "regularizer": str, "steps": int, "seed": int}
    if run.get("stage") != "ppo" or not all(isinstance(run.get(key), kind) for key, kind in needed.items()):
        raise ValueError(f"{folder}/config.json does not describe a PPO run")
    return run


def hint(folder):
    """What was probably meant by a folder that holds the run of all stages: its ppo folder."""
    return f": did you mean {Path(folder) / 'ppo'}?" if (Path(folder) / "ppo" / "config.json").is_file() else ""


@contextlib.contextmanager
def as_written(path):
    """Reading what this project has written: a field that is missing or something else is one line, with the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not as this project writes it ({type(e).__name__}: {e}): was it edited, or "
                         "damaged?") from None


def read_evaluation(folder):
    """A run's eval.json: its `records`, one per prompt, and the settings that they were made with."""
    path = Path(folder) / "eval.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no eval.json: is it a PPO run, run to its end with --eval_data?")
    found = read_json(path)
    records = found.get("records") if isinstance(found, dict) else None
    if not (isinstance(records, list) and records
            and all(isinstance(r, dict) and {"instruction", *SYSTEMS} <= r.keys() for r in records)):
        raise ValueError(f"{path} holds no records of an evaluation: --redo eval makes it again")
    return found


def load_run(folder, device="cpu", dtype=torch.float32):
    """The four models of a finished PPO run, with its policy. -> ActorCritic, RewardModel, Tokenizer"""
    folder = Path(folder)
    if not (folder / "policy").is_dir():
        raise FileNotFoundError(f"{folder} holds no finished PPO run: expected a folder policy in it")
    run = ppo_settings(folder)
    tokenizer = Tokenizer(folder / "policy" / "tokenizer.model")
    model, reward = folder / run["model"], folder / run["reward"]
    banned_ids = tokenizer.banned_ids(read_model_config(base_folder(model)).vocab_size)
    net, reward_model = build_models(model, reward, device, dtype, banned_ids, run["lora_rank"], run["lora_alpha"])
    check_trunks(folder, model=net.ref or net.policy, reward=reward_model.trunk)
    load_policy(net, folder / "policy")
    return net.eval(), reward_model.eval(), tokenizer


def check_trunks(folder, **trunks):
    """ValueError if a finished run was trained on other weights than those that its inputs hold now."""
    about = read_json(folder / "finished.json") if (folder / "finished.json").is_file() else {}
    known = about.get("trunks") if isinstance(about, dict) else None
    for name, before in zip(("model", "reward"), known if isinstance(known, list) else []):
        if name in trunks and fingerprint(trunks[name]) != before:
            raise ValueError(f"{folder} was trained with other weights than its --{name} holds now "
                             f"({ppo_settings(folder)[name]!r} from there): run its ppo stage again (--redo ppo)")


def answer(net, prompts, tokenizer, trained=True, **settings):
    """Responses (ids) of the policy, or, with trained=False, of the model that it started from."""
    settings |= {"eos_id": tokenizer.eos_id, "banned_ids": tokenizer.banned_ids(net.policy.config.vocab_size)}
    with net.acting(trained) as model:
        return generate(model, prompts, **settings)


def evaluate(net, reward_model, tokenizer, rows, row_ids, max_new_tokens, temperature, seed, micro_batch, earlier=None,
             generate_batch=None):
    """Answers to each row before and after training, beside its reference, with scores and KL. -> one record per row.

    rows: as data.load_eval_rows gives them. A row's answers depend on (seed, row id) alone, not on the rows beside it.
    earlier: records of these rows from an earlier step, whose reference and answers before training are taken over.
    generate_batch: rows decoded at once (None: all).
    """
    if not rows:
        return []
    prompts = [row["prompt"] for row in rows]
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=f"{seed} evaluation", row_ids=row_ids,
                    batch_size=generate_batch)
    answers = {"after": answer(net, prompts, tokenizer, **settings)}
    if not earlier:
        room = min(net.policy.config.max_seq_len, reward_model.trunk.config.max_seq_len)
        answers |= {"reference": [tokenizer.encode_response(row["output"])[:room - len(row["prompt"])] for row in rows],
                    "before": answer(net, prompts, tokenizer, trained=False, **settings)}
    after = assess(net, reward_model, prompts, answers["after"], tokenizer.eos_id, micro_batch)
    kl, scores = after.kl.sum(-1).tolist(), {"after": after.scores.tolist()}
    scores |= {k: score_responses(reward_model, prompts, answers[k], tokenizer.eos_id, micro_batch).tolist()
               for k in answers if k != "after"}
    records = []
    for i, row in enumerate(rows):
        record = dict(earlier[i]) if earlier else {k: row[k] for k in row if k not in ("prompt", "output")}
        for name, ids in answers.items():
            text = row["output"] if name == "reference" else tokenizer.decode_response(ids[i])
            record[name] = {"text": text, "tokens": len(ids[i]), "finished": ids[i][-1] == tokenizer.eos_id,
                            "score": scores[name][i]}
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
        raise ValueError(f"{path}: the toy world's annotators do not know the instruction "
                         f"{foreign[0]['instruction']!r}")


def judge(records, name):
    """The judge's scores of one system's answers: the annotators' in the toy world, else the reward model's."""
    if is_toy(records):
        return [world.annotator_score(r["instruction"], r[name]["text"], r[name]["finished"]) for r in records]
    return [r[name]["score"] for r in records]


def groups_of(records):
    """What is resampled together: in the toy world all prompts about one person, else each prompt for itself."""
    return ([world.parse(r["instruction"]).person.name for r in records] if is_toy(records)
            else list(range(len(records))))


def summarise(records):
    """Records of a run -> {system: {quantity: {"value", "se", "low", "high"}}}."""
    judged, groups = {name: judge(records, name) for name in SYSTEMS}, groups_of(records)
    lengths = {name: [r[name]["tokens"] for r in records] for name in SYSTEMS}
    win = lambda a, b: win_rate_with_error(judged[a], judged[b], groups)
    average = lambda values: ratio_with_error([(v, 1) for v in values], groups)
    equal = lambda a, b: win_rate_at_equal_length(judged[a], judged[b], lengths[a], lengths[b], groups)
    summary = {}
    for name in SYSTEMS:
        answers = [r[name] for r in records]
        s = {"score": average([a["score"] for a in answers]), "tokens": average([a["tokens"] for a in answers]),
             "eos_rate": average([float(a["finished"]) for a in answers])}
        if name != "reference":
            s |= {"win_reference": win(name, "reference"), "win_reference_equal": equal(name, "reference")}
        if name == "after":
            s |= {"win_before": win("after", "before"), "win_before_equal": equal("after", "before")}
            s["kl_per_token"] = ratio_with_error([(a["kl"], a["tokens"]) for a in answers], groups)
            s["kl_per_sequence"] = average([a["kl"] for a in answers])
        if is_toy(records):
            s |= {"annotator": average(judged[name])} | facts(records, name)
        summary[name] = s
    return summary


def facts(records, name):
    """Factual precision of a system's answers in the toy world: by fame, and by what the demonstrations taught."""
    answers = [(world.check_facts(r["instruction"], r[name]["text"]), world.parse(r["instruction"]).person)
               for r in records]
    ratio = lambda among, pair: ratio_with_error([pair(c) for c, _ in among], [person.name for _, person in among])
    famous, obscure = [[(c, person) for c, person in answers if person.famous == fame] for fame in (True, False)]
    return {"facts": ratio(answers, lambda c: (c.stated, 1)),
            "no_facts": ratio(answers, lambda c: (c.stated == 0, 1)),
            "precision_famous": ratio(famous, lambda c: (c.supported, c.stated)),
            "precision_obscure": ratio(obscure, lambda c: (c.supported, c.stated)),
            "precision_taught": ratio(obscure, lambda c: (c.taught_supported, c.taught_stated)),
            "precision_untaught": ratio(obscure, lambda c: (c.supported - c.taught_supported,
                                                            c.stated - c.taught_stated)),
            "untaught_share": ratio(obscure, lambda c: (c.stated - c.taught_stated, c.stated))}


ROWS = (("reward model's score", "score", "{:+.2f}"), ("annotators' score", "annotator", "{:+.2f}"),
        ("win rate against the reference", "win_reference", "{:.1%}"),
        ("  - at equal length", "win_reference_equal", "{:.1%}"),
        ("win rate against SFT", "win_before", "{:.1%}"), ("  - at equal length", "win_before_equal", "{:.1%}"),
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
    """value +-standard error"""
    return f"{form.format(x['value'])} +-{form.format(x['se']).lstrip('+')}"


def table(summary):
    """The summary as text: a row per quantity, a column per system, standard errors behind +-."""
    def cell(name, key, form):
        x = summary[name].get(key)
        return "" if x is None else with_se(x, form) if x["value"] == x["value"] else "none stated"

    lines = [f"{'':38}{'reference':>18}{'SFT (before)':>18}{'PPO (after)':>18}"]
    for label, key, form in ROWS:
        if any(key in summary[name] for name in SYSTEMS):
            lines.append(f"{label:38}" + "".join(f"{cell(name, key, form):>18}" for name in SYSTEMS))
    return "\n".join(lines)


def report(folder):
    """Table and side-by-side answers of a run folder that has been evaluated."""
    records = read_evaluation(folder)["records"]
    with as_written(Path(folder) / "eval.json"):
        summary = summarise(records)
    w = summary["after"]["win_before"]
    judge_name = "the simulated annotators" if is_toy(records) else "the reward model itself, which PPO has maximised"
    lines = ["", f"{len(records)} evaluation prompts, judged by {judge_name}; +- is one standard error", "",
             table(summary), "",
             f"PPO against SFT: {w['value']:.1%}, 95 % interval {w['low']:.1%} to {w['high']:.1%}", ""]
    for r in [records[len(records) * k // 7] for k in (1, 4, 6)]:
        lines += [f"> {r['instruction']}", f"  before: {r['before']['text']}", f"  after:  {r['after']['text']}", ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- several runs: outcomes, table, figures

TRAINING = (("score", "reward model's score"), ("kl_per_token", "KL from SFT, nats per token"),
            ("entropy", "entropy, nats per token"), ("clip_frac", "share of tokens clipped"),
            ("explained_variance", "explained variance of returns"),
            ("length", "length, tokens"), ("eos_rate", "share of answers that end"))
INPUTS = ("stage", "seed", "model", "reward", "tokenizer", "prompts")      # settings that do not make another variant


def read_lines(path):
    """Records of a JSONL file, one per step; none where there is no file."""
    rows = read_rows(path) if path.is_file() and path.stat().st_size else []
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise ValueError(f"{path} holds a line that is no record of a step")
    return rows


def outcome(folder):
    """What a PPO run folder tells, small enough to be committed: its settings; `curve`, the evaluation at each step
    that has one (step 0 is SFT); `training`, some columns of metrics.jsonl; `wins`, per group of prompts [n, wins
    against the reference, against SFT]."""
    folder = Path(folder)
    settings, evals = ppo_settings(folder), read_lines(folder / "evals.jsonl")
    metrics = read_lines(folder / "metrics.jsonl")
    records = read_evaluation(folder)["records"] if (folder / "eval.json").is_file() else []
    with as_written(folder / "eval.json"):
        won = wins(records)
        if records and not (evals and evals[-1]["step"] == settings["steps"]):
            evals.append({"step": settings["steps"]} | summarise(records))
    with as_written(folder / "evals.jsonl"):
        curve = [{"step": row["step"]} | row["after"] for row in evals]
        if evals:
            by_definition = {"win_before": 0.5, "win_before_equal": 0.5, "kl_per_token": 0.0, "kl_per_sequence": 0.0}
            curve.insert(0, {"step": 0} | {k: {"value": v, "se": 0.0} for k, v in by_definition.items()}
                         | evals[-1]["before"])
        reference = evals[-1]["reference"] if evals else {}
    with as_written(folder / "metrics.jsonl"):
        shown = [row for i, row in enumerate(metrics) if i % 4 == 0 or i == len(metrics) - 1]
        training = {key: [row[key] + 0 for row in shown] for key in ("step", *dict(TRAINING))}
    return compact({"seed": settings["seed"], "settings": settings, "wins": won, "curve": curve,
                    "reference": reference, "training": training})


def wins(records):
    """Per group of prompts [how many, wins against the reference, wins against SFT]; a draw is half."""
    judged, table = {name: judge(records, name) for name in SYSTEMS}, {}
    against = [outcomes(judged["after"], judged[name]) for name in ("reference", "before")]
    for group, *won in zip(groups_of(records), *against):
        table[str(group)] = [a + b for a, b in zip(table.get(str(group), (0, 0, 0)), (1, *won))]
    return table


def compact(x):
    """Numbers to four digits, errors without their intervals, which follow from them."""
    if isinstance(x, dict):
        return {k: compact(v) for k, v in x.items() if not ("se" in x and k in ("low", "high"))}
    return [compact(v) for v in x] if isinstance(x, (list, tuple)) else float(f"{x:.4g}") if isinstance(x, float) else x


def load_outcomes(paths):
    """PPO run folders, outcomes as toy/study.py writes them, folders of such -> {variant: outcomes, one per seed}.

    Runs with the same settings but for seed and inputs are one variant; if two of them have one seed, say with other
    reward models, each is a variant for itself, called by its path."""
    files = {}                                                                       # (each once)
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: expected PPO run folders, or outcomes of toy/study.py")
        is_study = path.is_dir() and not (path / "config.json").is_file()
        files |= {p.resolve(): p for p in (sorted(path.glob("*.json")) if is_study else [path])}
    files = list(files.values())
    found = [outcome(p) if p.is_dir() else read_json(p) for p in files]
    needed = {"curve", "settings", "seed", "wins", "training"}
    if not found or not all(isinstance(o, dict) and needed <= o.keys() for o in found):
        raise ValueError(f"{', '.join(map(str, paths))}: expected PPO run folders, "
                         f"or outcomes that toy/study.py has written{next(filter(None, map(hint, paths)), '')}")
    variants, settings = {}, [o["settings"] for o in found]
    differ = [k for k in settings[0] if k not in INPUTS and len({str(x.get(k)) for x in settings}) > 1]
    for file, o in sorted(zip(files, found), key=lambda pair: (pair[1].get("order", 0), pair[1]["seed"])):
        name = (o.get("variant")
                or ", ".join(f"{k} {o['settings'].get(k)}" for k in differ) or o["settings"]["regularizer"])
        variants.setdefault(name, {})[file] = o
    named = {}
    for name, runs in variants.items():
        apart = len({o["seed"] for o in runs.values()}) < len(runs)
        for file, o in runs.items():
            named.setdefault(str(file) if apart else name, []).append(o)
    return named


UNKNOWN = {"value": float("nan"), "se": float("nan")}


def series(runs, x, y):
    """Points of one variant over its seeds: [(mean of x, y with its error)],
    one per step that every seed was evaluated at."""
    rows = [{row["step"]: row for row in o["curve"]} for o in runs]
    steps = sorted(set.intersection(*map(set, rows)))
    return [(mean([s if x == "step" else r[s][x]["value"] for r in rows]),
             over_seeds([r[s].get(y, UNKNOWN) for r in rows]))
            for s in steps]


def difference(runs, others, column):
    """Win rate of one variant minus that of another, paired by seed and prompt: column 1 against the reference, 2
    against SFT. None where no seed has both."""
    by_seed, results = {o["seed"]: o["wins"] for o in others}, []
    for o in runs:
        a, b = o["wins"], by_seed.get(o["seed"], {})
        if a and a.keys() == b.keys():
            results.append(ratio_with_error([(a[g][column] - b[g][column], a[g][0]) for g in a]))
    return over_seeds(results) if results else None


COLUMNS = (("vs reference", "win_reference", "{:.1%}"), ("equal length", "win_reference_equal", "{:.1%}"),
           ("vs SFT", "win_before", "{:.1%}"), ("equal length", "win_before_equal", "{:.1%}"),
           ("KL/token", "kl_per_token", "{:.3f}"), ("tokens", "tokens", "{:.1f}"),
           ("gold", "annotator", "{:.2f}"), ("proxy", "score", "{:.2f}"), ("famous", "precision_famous", "{:.1%}"),
           ("obscure", "precision_obscure", "{:.1%}"), ("no facts", "no_facts", "{:.1%}"))


def study_table(variants, base):
    """A row per variant at its last step: mean over seeds +- standard error (over_seeds),
    and the difference from `base`."""
    def cell(x, form):
        return with_se(x, form) if x and x["value"] == x["value"] else "-"

    width, last = max(map(len, variants)) + 2, max(22, len(base) + 8)
    lines = ["mean over seeds +- standard error, of prompts and seeds (one seed: of prompts alone); the last column "
             f"is the win rate against the reference minus that of {base!r}, paired by prompt", "",
             f"{'':{width}}{'seeds':>5}" + "".join(f"{label:>16}" for label, *_ in COLUMNS)
             + f"{'minus ' + base:>{last}}"]
    for name, runs in variants.items():
        cells = [cell(over_seeds([(o["curve"] or [{}])[-1].get(key, UNKNOWN) for o in runs]), form)
                 for _, key, form in COLUMNS]
        minus = cell(difference(runs, variants[base], 1), "{:+.1%}") if name != base else ""
        evaluated = sum(bool(o["curve"]) for o in runs)
        lines.append(f"{name:{width}}{evaluated:>5}" + "".join(f"{c:>16}" for c in cells) + f"{minus:>{last}}")
    return "\n".join(lines)


def seeds_table(variants, base):
    """What single seeds say of the variants that have several: win rate, its difference from `base`, and KL."""
    won, kl = (lambda o: o["curve"][-1]["win_reference"]["value"]), (lambda o: o["curve"][-1]["kl_per_token"]["value"])
    width = max(map(len, variants)) + 2
    lines = ["", f"by seed: win rate against the reference; minus that of {base!r}, with 95 % interval; KL per token"]
    for name, runs in variants.items():
        if len(runs) > 1 and all(o["curve"] for o in runs):
            d = difference(runs, variants[base], 1)
            of_base = {o["seed"]: won(o) for o in variants[base] if o["curve"]}
            less = " ".join(f"{won(o) - of_base[o['seed']]:+.1%}" for o in runs if o["seed"] in of_base)
            interval = f"({d['low']:+.1%} to {d['high']:+.1%})" if d and name != base else ""
            lines.append(f"  {name:{width}}" + " ".join(f"{won(o):.1%}" for o in runs) + f"   {less} {interval}   "
                         + " ".join(f"{kl(o):.3f}" for o in runs))
    return "\n".join(lines) if len(lines) > 2 else ""


WIN, KL = "win rate against the reference", "KL from SFT, nats per token (over the vocabulary)"
FIGURES = (      # file, group of variants, title, key and label of x, (key, label) of each panel's y
    ("win_steps", "regularizer", "Win rate over training", ("step", "PPO step"), (("win_reference", WIN),)),
    ("win_kl", "regularizer", "Win rate against distance from SFT", ("kl_per_token", KL), (("win_reference", WIN),)),
    ("precision_kl", "lora_full", "Factual precision, LoRA and full fine-tuning", ("kl_per_token", KL),
     (("precision_famous", "supported / stated facts, famous people"),
      ("precision_obscure", "supported / stated facts, obscure people"))),
    ("scores_kl", "regularizer", "What PPO maximises, and what it stands for", ("kl_per_token", KL),
     (("score", "proxy: reward model's score"), ("annotator", "gold: annotators' score"))))


def figure_data(variants):
    """-> per figure (file, title, label of x, {label of y: {variant: points}}). Variants that say which figures they
    belong to (toy/study.py's do) are in those, any other in all; a figure for which the data say nothing is left
    out."""
    for file, group, title, (x, x_label), ys in FIGURES:
        chosen = {name: [o for o in runs if o["curve"]] for name, runs in variants.items()
                  if group in runs[0].get("groups", [group])}
        told = lambda y: [name for name, runs in chosen.items() if runs and any(y in row for row in runs[0]["curve"])]
        drawn = lambda y: {name: points for name in told(y) if (points := series(chosen[name], x, y))}
        panels = {y_label: drawn(y) for y, y_label in ys}
        if all(panels.values()):
            yield file, title, x_label, panels


def figure_text(figures):
    """The numbers of the figures, for where there is no matplotlib."""
    lines = []
    for _, title, x_label, panels in figures:
        for y_label, drawn in panels.items():
            lines += ["", f"{title}: {y_label} against {x_label}; 95 % interval"]
            for name, points in drawn.items():
                lines += [f"  {name:32} {x:8.3f}  {y['value']:8.3f}  {y['low']:8.3f} to {y['high']:8.3f}"
                          for x, y in points]
    return "\n".join(lines)


# Okabe and Ito's colours, which colour-blind people tell apart, each with a marker of its own (jfly.uni-koeln.de/color)
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777")
MARKERS = "osD^vPX*<>ph"


def draw(axis, points, i, name=None, band=False):
    """One variant: markers, a line, and +- one standard error as a band or as bars (along KL a curve can turn back)."""
    colour, x, values = COLOURS[i % len(COLOURS)], [p for p, _ in points], [y["value"] for _, y in points]
    axis.plot(x, values, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5,
              linestyle="-" if i < len(COLOURS) else "--", linewidth=1.3, label=name)
    low, high = [y["value"] - y["se"] for _, y in points], [y["value"] + y["se"] for _, y in points]
    if band:
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    else:
        axis.vlines(x, low, high, color=colour, linewidth=1, alpha=0.5)


def draw_over_steps(plt, title, x_label, y_label, drawn):
    """A panel per variant, the others in grey behind it: bands of ten variants in one panel would hide each other."""
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns + 1.2, 2.6 * rows + 1),
                                sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(drawn):]:
        axis.set_visible(False)
    for i, (axis, name) in enumerate(zip(axes.flat, drawn)):
        for other in drawn:
            axis.plot([x for x, _ in drawn[other]], [y["value"] for _, y in drawn[other]],
                      color="#999999", linewidth=0.6)
        draw(axis, drawn[name], i, band=True)
        axis.set_title(f"{name} (n {drawn[name][0][1]['seeds']})", fontsize=10)
        axis.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(x_label), figure.supylabel(y_label)
    figure.suptitle(f"{title}; band: one standard error, n: seeds, grey: the other variants", fontsize=11)
    return figure


def draw_panels(plt, title, x_label, panels):
    """A panel per quantity over KL, all variants in it, one legend beside them. KL is drawn by its square root, which
    is about how far a policy has gone (Gao, Schulman, Hilton, arXiv 2210.10760)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels) + 2.6, 4.8),
                                squeeze=False, layout="constrained")
    for axis, (y_label, drawn) in zip(axes[0], panels.items()):
        for i, (name, points) in enumerate(drawn.items()):
            draw(axis, points, i, f"{name} (n {points[0][1]['seeds']})")
        axis.set_xscale("function", functions=(lambda kl: numpy.sign(kl) * abs(kl) ** 0.5,
                                               lambda root: numpy.sign(root) * root ** 2))
        axis.set_xlabel(x_label), axis.set_ylabel(y_label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(f"{title}; bars: one standard error, n: seeds", fontsize=11)
    return figure


def draw_training(plt, name, run):
    """The training curves of one run, from its metrics."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.4), layout="constrained")
    axes.flat[-1].set_visible(False)
    for axis, (key, label) in zip(axes.flat, TRAINING):
        axis.plot(run["training"]["step"], run["training"][key], color=COLOURS[4])
        axis.set_title(label, fontsize=10), axis.set_xlabel("PPO step")
    figure.suptitle(f"Training of {name}, seed {run['seed']}", fontsize=11)
    return figure


def training_text(name, run):
    """The numbers of draw_training."""
    rows = zip(*(run["training"][key] for key in ("step", *dict(TRAINING))))
    return "\n".join(["", f"Training of {name}, seed {run['seed']}",
                      "".join(f"{key:>20}" for key in ("step", *dict(TRAINING)))]
                     + ["".join(f"{x:>20.4g}" for x in row) for row in rows])


def write_figures(variants, folder):
    """Draw every figure that the data allow; without matplotlib print the same numbers.
    The first variant's first run gives the training curves."""
    name, runs = next(iter(variants.items()))
    figures = list(figure_data(variants))
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print(figure_text(figures) + "\n" + training_text(name, runs[0]))
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    drawn = {"training": draw_training(plt, name, runs[0])}
    for file, title, x, panels in figures:
        one = file == "win_steps"      # (bands, and so a panel per variant)
        drawn[file] = (draw_over_steps(plt, title, x, *next(iter(panels.items()))) if one
                       else draw_panels(plt, title, x, panels))
    for file, figure in drawn.items():
        figure.savefig(Path(folder) / f"{file}.png", dpi=110)
        print(Path(folder) / f"{file}.png")


# ------------------------------------------------------------------------------------- answers to files of instructions

PRESETS = {
    "alpacafarm": dict(temperature=0.7, top_p=1.0, max_new_tokens=300),      # AlpacaFarm's and the paper's evaluation
    "alpacaeval": dict(temperature=0.7, top_p=1.0, max_new_tokens=2048),
    "paper": dict(temperature=0.0, top_p=1.0, max_new_tokens=512)}           # the paper's texts for factuality: greedy


def load_answering(path, adapter_path=None, alpha=None, tokenizer=None, device="cpu", dtype=torch.float32):
    """A policy that can answer: that of a PPO run, or a model folder, or a PEFT folder (merged into its base); with
    adapter_path an adapter on top (a PEFT folder, or the paper's released file with its alpha).
    -> ActorCritic, Tokenizer"""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    if not any((path / name).exists() for name in ("policy", "config.json", "params.json", "adapter_config.json")):
        raise FileNotFoundError(f"{path} holds no model: expected a PPO run folder, a model folder or a PEFT folder"
                                f"{hint(path)}")
    run = ppo_settings(path) if (path / "policy").is_dir() else {}
    if alpha is not None and not adapter_path or run and adapter_path:
        raise ValueError(f"{path} is a PPO run, which has its own adapter: "
                         f"no --{'adapter' if adapter_path else 'alpha'} goes with it"
                         if run else "--alpha goes with --adapter")
    base = path / run["model"] if run else path
    adapter_path = path / "policy" if run.get("lora_rank") else adapter_path
    if run and not run["lora_rank"]:
        base = path / "policy"
    places = [path / "policy", path, base, base_folder(base)]
    own = next((p / "tokenizer.model" for p in places if (p / "tokenizer.model").is_file()), path / "tokenizer.model")
    tokenizer = Tokenizer(tokenizer or own)
    tokenizer.check_against(own.parent)
    model = load_trunk(base, device, dtype)
    if run.get("lora_rank"):
        check_trunks(path, model=model)
    tokenizer.check_fits(model.config.vocab_size, base)
    if adapter_path:
        load_lora(model, "policy", adapter_path, alpha)
    return ActorCritic(model, "policy" if adapter_path else None), tokenizer


def answer_rows(net, tokenizer, rows, where, batch=32, part=None, **settings):
    """Texts answering rows of instruction and input, in their order.
    settings: temperature, top_p, max_new_tokens, seed.

    A row's answer depends on the settings and on its place in the list, not on the rows beside it; it ends early where
    the model has no positions left. With `part`, a path, finished answers are kept there (JSON lines), and a call with
    the same rows and settings goes on behind them: an interrupted export continues.
    """
    prompts, room = load_prompts(where, tokenizer, rows=rows)[0], net.policy.config.max_seq_len
    too_long = [i for i, p in enumerate(prompts) if len(p) >= room]
    if too_long:
        raise ValueError(f"{where}, row {too_long[0]}: "
                         f"the prompt has {len(prompts[too_long[0]])} tokens, the model {room} positions")
    weights = [fingerprint(net.policy),
               *(p.double().sum().item() for p in lora_parameters(net.policy, net.policy_adapter))]
    key = keyed_seed(json.dumps(settings), prompts, weights)
    texts = read_part(part, key) if part else []
    for start in range(len(texts), len(rows), batch):
        ids = range(start, min(start + batch, len(rows)))
        answers = answer(net, [prompts[i] for i in ids], tokenizer, row_ids=ids,
                         limits=[room - len(prompts[i]) for i in ids], **settings)
        texts += [tokenizer.decode_response(a) for a in answers]
        if part:
            with open(part, "a", encoding="utf-8") as f:
                f.writelines(([] if start else [f"{key}\n"]) + [json.dumps(t) + "\n" for t in texts[start:]])
            print(f"\r{len(texts)} of {len(rows)} answers",
                  end="" if len(texts) < len(rows) else "\n", file=sys.stderr, flush=True)
    return texts


def read_part(part, key):
    """The answers that an interrupted call has left behind the key of this call, if any; half a line is cut off."""
    if not part.is_file():
        return []
    lines = read_text(part).split("\n")
    if len(lines) < 3 and str(key).startswith(lines[0]):       # cut off before the first answer was whole
        part.unlink()
        return []
    if lines[0] != str(key):
        raise ValueError(f"{part} was begun with another model, other instructions or settings: "
                         "give the same, or remove it")
    whole = lines[1:-1]                                    # (the last line has no end: empty, or cut off)
    texts = [parse_json(line, part, number) for number, line in enumerate(whole, 2)]
    odd = next((number for number, text in enumerate(texts, 2) if not isinstance(text, str)), None)
    if odd:
        raise ValueError(f"{part}, line {odd}: expected an answer, a text; remove the file to begin anew")
    part.write_text("\n".join([lines[0], *whole, ""]), encoding="utf-8")
    return texts


def joined_instruction(row):
    """instruction and input as alpaca_eval wants them: one text, a blank line between."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


FORMATS = {      # what the judges read: a row of ours, the answer, the name of the model -> their row
    "answers": lambda row, text, name: {"instruction": row["instruction"], "input": row.get("input", ""),
                                        "output": text},
    "alpaca_eval": lambda row, text, name: {"instruction": joined_instruction(row), "output": text, "generator": name},
    "alpacafarm": lambda row, text, name: {"instruction": row["instruction"], "input": row.get("input", ""),
                                           "output_1": row["output"], "output_2": text},
    "factscore": lambda row, text, name: {"topic": row["topic"], "output": text}}


def instructions(path, form):
    """Rows to answer. factscore: a file of names, one a line, each asked for as FActScore does; else JSON rows."""
    if form == "factscore":
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file of names at {path}")
        names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
        if not names or names[0][0] in "[{":
            raise ValueError(f"{path}: expected names, one a line, got {'JSON' if names else 'none'}")
        return [{"topic": name, "instruction": f"Tell me a bio of {name}."} for name in names]
    rows = read_rows(path)
    for i, row in enumerate(rows if form == "alpacafarm" else []):
        text_field(row, "output", f"{path}, row {i} (output_1 of a pair is the reference's)")
    return rows


def write_rows(path, rows, form):
    """JSON, or for factscore JSON lines, under a temporary name, then renamed."""
    if form == "factscore":
        Path(f"{path}.tmp").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows),
                                       encoding="utf-8")
        Path(f"{path}.tmp").replace(path)
    else:
        write_json(path, rows)


def check_output(path, source=None):
    """Refuse what could not be written, before an hour of answers; and what would replace the file that is read."""
    if source and Path(path).resolve() == Path(source).resolve():
        raise ValueError(f"--output {path} is the file of --input: it would be replaced, choose another")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise ValueError(f"cannot write to {path}: "
                         + ("it is a folder" if Path(path).is_dir() else "its folder does not exist"))


def save_merged(net, tokenizer, folder):
    """The policy as one Hugging Face folder, its adapter merged, with the tokenizer: AutoModelForCausalLM and
    AutoTokenizer read it (the latter needs sentencepiece and protobuf). Returns whether transformers will tokenise as
    we do: pieces that sentencepiece holds as user-defined, as the toy world's, it does not know."""
    if net.policy_adapter:
        merge_lora(net.policy, net.policy_adapter)
    save_llama(net.policy, folder)
    shutil.copy(tokenizer.path, Path(folder) / "tokenizer.model")
    names = {f"{name}_token": tokenizer.sp.id_to_piece(i) for name, i in
             (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("unk", tokenizer.unk_id)) if i >= 0}
    write_json(Path(folder) / "special_tokens_map.json", names)
    write_json(Path(folder) / "tokenizer_config.json",
               names | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                        "legacy": True, "clean_up_tokenization_spaces": False,
                        "model_max_length": net.policy.config.max_seq_len})
    write_json(Path(folder) / "generation_config.json",
               {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    return not tokenizer.has_user_defined_pieces


# --------------------------------------------------------------------------------------------------- outside judgements

def count_preferences(preferences, where="judgements"):
    """Judgements as alpaca_eval and AlpacaFarm write them -> win rate of output_2, its standard error, and the counts.

    1: output_1 is better, 2: output_2, 1.5 or (AlpacaFarm) 0: a draw, between 1 and 2: a leaning. A leaning counts as
    wins - 1 in the win rate, and as a win or a loss by its side; anything else (a judge that failed) is left out. The
    standard error is that of the mean, with n - 1.
    """
    valid = [1.5 if p == 0 else p for p in preferences
             if isinstance(p, (int, float)) and not isinstance(p, bool) and (p == 0 or 1 <= p <= 2)]
    if not valid:
        raise ValueError(f"{where}: no row has a preference between 1 and 2")
    wins = torch.tensor(valid, dtype=torch.float64) - 1
    return {"win_rate": wins.mean().item(),
            "standard_error": wins.std().item() / len(valid) ** 0.5 if len(valid) > 1 else float("nan"),
            "n_wins": int((wins > 0.5).sum()), "n_wins_base": int((wins < 0.5).sum()),
            "n_draws": int((wins == 0.5).sum()), "n_total": len(valid), "left_out": len(preferences) - len(valid)}


def judge_pairs(rows, where, reward_model, tokenizer, batch):
    """Scores that a reward model gives to output_1 and output_2 of each row. -> two lists"""
    prompts = load_prompts(where, tokenizer, rows=rows)[0]
    room, scores = reward_model.trunk.config.max_seq_len, []
    for key in ("output_1", "output_2"):
        ids = [tokenizer.encode_response(text_field(row, key, f"{where}, row {i}")) for i, row in enumerate(rows)]
        long = [i for i in range(len(rows)) if len(prompts[i]) + len(ids[i]) > room]
        if long:
            raise ValueError(f"{where}, row {long[0]}: {key} does not fit the reward model's {room} positions")
        scores.append(score_responses(reward_model, prompts, ids, tokenizer.eos_id, batch).tolist())
    return scores


# ---------------------------------------------------------------------------------------------------- command line

def device_and_dtype(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = args.dtype if args.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    return device, getattr(torch, name)


def load_from(args):
    """Policy and tokenizer that the arguments of generate, chat and export name, and how to decode."""
    net, tokenizer = load_answering(args.run, args.adapter, args.alpha, args.tokenizer, *device_and_dtype(args))
    given = {k: getattr(args, k) for k in PRESETS["alpacafarm"] if getattr(args, k) is not None}
    return net, tokenizer, PRESETS[args.preset] | given | {"seed": args.seed}


def command_generate(args):
    check_output(args.output, args.input) if args.output else None
    net, tokenizer, settings = load_from(args)
    rows = [{"instruction": args.prompt}] if args.prompt is not None else read_rows(args.input)
    part = Path(f"{args.output}.part") if args.output else None
    texts = answer_rows(net, tokenizer, rows, args.input or "--prompt", args.batch, part, **settings)
    if args.output:
        write_rows(args.output, [FORMATS["answers"](row, text, "") for row, text in zip(rows, texts)], "answers")
        part.unlink()
    else:
        print("\n\n".join(texts))


def command_chat(args):
    net, tokenizer, settings = load_from(args)
    print("An instruction a line; each is answered for itself (the template knows no dialogue). Ctrl-D ends.",
          file=sys.stderr)
    for turn in itertools.count():
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            text = "\ud800"                                 # (no text: answer_rows says so)
        try:
            if text.strip():
                print(*answer_rows(net, tokenizer, [{"instruction": text}], "your line",
                                   **settings | {"seed": f"{args.seed} {turn}"}), "",
                      sep="\n")
        except ValueError as e:
            print(e, file=sys.stderr)


def command_export(args):
    if args.format == "merged":
        given = [name for name in ("input", "generator", *PRESETS["alpacafarm"]) if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--format merged writes the model and answers nothing: no --{given[0]} goes with it")
        check_new_folder(args.output)
        net, tokenizer, _ = load_from(args)
        if not save_merged(net, tokenizer, args.output):
            print(f"note: {tokenizer.path} has user-defined pieces, which transformers' LlamaTokenizer "
                  "does not know: give the model ids from this project's tokenizer", file=sys.stderr)
        return
    if not args.input:
        raise ValueError(f"--format {args.format} needs --input: "
                         f"{'names, one a line' if args.format == 'factscore' else 'JSON rows'}")
    rows = instructions(args.input, args.format)
    check_output(args.output, args.input)
    net, tokenizer, settings = load_from(args)
    part = Path(f"{args.output}.part")
    texts = answer_rows(net, tokenizer, rows, args.input, args.batch, part, **settings)
    name = args.generator or Path(args.run).resolve().name
    write_rows(args.output, [FORMATS[args.format](row, text, name) for row, text in zip(rows, texts)], args.format)
    part.unlink()


def command_winrate(args):
    rows = read_rows(args.file)
    if not args.reward:
        c = count_preferences([row.get("preference") if isinstance(row, dict) else None for row in rows],
                              args.file)
        if c["n_total"] == 1:
            raise ValueError(f"{args.file} has one judgement: that is no win rate")
        low, high = win_rate_interval(c["win_rate"], c["standard_error"])
        print(f"output_2 wins {c['win_rate']:.2%} +-{c['standard_error']:.2%} "
              f"(95 % interval {low:.1%} to {high:.1%}) of {c['n_total']}: "
              f"{c['n_wins']} wins, {c['n_wins_base']} losses, {c['n_draws']} draws"
              + (f"; {c['left_out']} without a judgement left out" if c["left_out"] else ""))
        return
    if is_adapter(args.reward) and not args.model:
        raise ValueError(f"--reward {args.reward} is an adapter: name the model that it was trained on with --model")
    if len(rows) == 1:
        raise ValueError(f"{args.file} has one pair: that is no win rate")
    device, dtype = device_and_dtype(args)
    trunk = load_trunk(args.model, device, dtype) if args.model else None
    reward_model = load_reward_model(args.reward, device, dtype, trunk)
    tokenizer = Tokenizer(args.tokenizer or Path(args.reward) / "tokenizer.model")
    tokenizer.check_fits(reward_model.trunk.config.vocab_size, args.reward)
    tokenizer.check_against(args.reward)
    first, second = judge_pairs(rows, args.file, reward_model, tokenizer, args.batch)
    w = win_rate_with_error(second, first)
    print(f"output_2 wins {w['value']:.2%} +-{w['se']:.2%} "
          f"(95 % interval {w['low']:.1%} to {w['high']:.1%}) of {len(rows)}, judged by {args.reward}; "
          f"mean scores {mean(first):+.3f} and {mean(second):+.3f}")


def win_rate_interval(value, se):
    """Normal 95 % interval, within 0 and 1."""
    return max(0.0, value - 1.96 * se), min(1.0, value + 1.96 * se)


def command_recover(args):
    total, published = recover(args.base, args.diff, args.out, getattr(torch, args.dtype))
    print(f"{args.out}: the weights sum to {total:.4f}; "
          + (f"published: {published:.4f}, they agree" if published is not None
             else "the diff has no model_sum.txt, so this was not compared"))


def command_table(args):
    if len(args.runs) == 1 and (Path(args.runs[0]) / "config.json").is_file():
        if args.base:
            raise ValueError(f"--base {args.base}: {args.runs[0]} is one run, there is nothing to compare it with")
        print(report(args.runs[0]))
        return
    variants = load_outcomes(args.runs)
    base = args.base or next(iter(variants))
    if base not in variants:
        raise ValueError(f"--base {base}: the variants are {', '.join(variants)}")
    print(study_table(variants, base))
    print(seeds_table(variants, base))


def command_figures(args):
    write_figures(load_outcomes(args.runs), args.out)


def at_least_one(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def add_decoding(p):
    """Arguments of the commands that let a policy answer."""
    p.add_argument("run", metavar="RUN", help="PPO run folder such as runs/toy/ppo, a model folder, or a PEFT folder")
    p.add_argument("--adapter", help="an adapter on RUN: a PEFT folder, or the paper's released pytorch_model.bin")
    p.add_argument("--alpha", type=float, help="alpha of --adapter, if its file does not say it (the paper's: 64)")
    p.add_argument("--tokenizer", help="sentencepiece file (default: tokenizer.model of RUN)")
    p.add_argument("--preset", choices=list(PRESETS), default="alpacafarm", help="; ".join(
        f"{k}: temperature {v['temperature']}, {v['max_new_tokens']} tokens" for k, v in PRESETS.items()))
    for name, kind in (("temperature", float), ("top_p", float), ("max_new_tokens", int)):
        p.add_argument(f"--{name}", type=kind, help="instead of the preset's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=at_least_one, default=32, help="answers decoded at once (32)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="auto: float32 on a CPU, bfloat16 on a GPU")


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is an exception like any other: one line, status 2."""

    def error(self, message):
        raise ValueError(message)


def add_judge(p):
    """Arguments of `winrate`: the file, and the reward model that judges it."""
    p.add_argument("file", metavar="FILE",
                   help="alpaca_eval's or AlpacaFarm's annotations (preference); with --reward: pairs")
    p.add_argument("--reward", help="reward model folder that judges the pairs, instead of the file's preferences")
    p.add_argument("--model", help="the trunk of --reward, if that is an adapter")
    p.add_argument("--tokenizer", help="sentencepiece file (default: tokenizer.model of --reward)")
    p.add_argument("--batch", type=at_least_one, default=32, help="rows scored at once (32)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, help):
        p = commands.add_parser(name, help=help, allow_abbrev=False)
        p.set_defaults(command=function)
        return p

    data = "PPO run folder, such as runs/toy/ppo, or study data, such as toy/study"
    p = command("table", command_table, "the table of a finished run; of several a row per variant")
    p.add_argument("runs", nargs="+", metavar="RUN", help=data)
    p.add_argument("--base", help="variant that the others' win rates are compared with, paired (default: the first)")
    p = command("figures", command_figures, "pictures of runs; without matplotlib their numbers")
    p.add_argument("runs", nargs="+", metavar="RUN", help=f"{data} (train.py's --eval_every gives the curves)")
    p.add_argument("--out", default="figures", metavar="FOLDER", help="where the pictures go (default: figures)")
    p = command("generate", command_generate, "answer one instruction or a file of them")
    add_decoding(p)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one instruction")
    source.add_argument("--input", help="JSON rows of instruction, input")
    p.add_argument("--output", help="write JSON rows of instruction, input, output (default: print)")
    add_decoding(command("chat", command_chat, "answer instructions that you type"))
    p = command("export", command_export, "answers in a judge's format, or the merged model as a Hugging Face folder")
    add_decoding(p)
    p.add_argument("--format", choices=("alpaca_eval", "alpacafarm", "factscore", "merged"), default="alpaca_eval")
    p.add_argument("--input",
                   help="JSON rows of instruction, input (alpacafarm: and output); factscore: names, one a line")
    p.add_argument("--output", required=True, help="file, or for --format merged a folder")
    p.add_argument("--generator", help="name of the model in alpaca_eval's rows (default: RUN's last part)")
    add_judge(command("winrate", command_winrate, "win rate of output_2 over output_1 in annotations or pairs"))
    p = command("recover", command_recover, "a tuned model from LLaMA and a released weight diff")
    p.add_argument("base", metavar="LLAMA", help="folder of the model that the diff was made for")
    p.add_argument("diff", metavar="DIFF", help="folder of the weight diff, such as alpaca-farm-sft10k-wdiff")
    p.add_argument("out", metavar="OUT", help="folder to write")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="of the written weights")
    return parser


def main(argv=None):
    try:
        args = build_parser().parse_args(argv)
        args.command(args)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"eval.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\neval.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
