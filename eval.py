"""What came out: answers before and after PPO, win rates, factual precision, the reward model's accuracy.

    python eval.py table runs/toy/ppo                       the table of a finished run, once more
    python eval.py generate runs/toy/ppo --prompt "Who is Mira Brenson?"
    python eval.py generate runs/toy/ppo --input questions.json --output answers.json
    python eval.py chat runs/toy/ppo                        answers what you type
    python eval.py export runs/ppo --format alpaca_eval --input eval.json --output outputs.json
    python eval.py winrate annotations.json                 what an outside judge has said
    python eval.py recover llama-7b sft10k-wdiff sft10k     a released weight diff

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
import itertools
import json
import shutil
import sys
from pathlib import Path

import torch

from data import Tokenizer, load_prompts, read_rows, text_field
from lora import base_folder, load_lora, merge_lora
from model import generate, keyed_seed, read_json, read_model_config, read_text, save_llama, write_json
from reward import (ActorCritic, assess, build_models, load_policy, load_reward_model, load_trunk, recover,
                    score_responses)
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
    banned_ids = tokenizer.banned_ids(read_model_config(base_folder(model)).vocab_size)
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


# ------------------------------------------------------------------------------------- answers to files of instructions

PRESETS = {"alpacafarm": dict(temperature=0.7, top_p=1.0, max_new_tokens=300),      # AlpacaFarm's and the paper's evaluation
           "alpacaeval": dict(temperature=0.7, top_p=1.0, max_new_tokens=2048),
           "paper": dict(temperature=0.0, top_p=1.0, max_new_tokens=512)}           # the paper's texts for factuality: greedy


def load_answering(path, adapter_path=None, alpha=None, tokenizer=None, device="cpu", dtype=torch.float32):
    """A policy that can answer: that of a PPO run, or a model folder, or a PEFT folder (merged into its base); with
    adapter_path an adapter on top (a PEFT folder, or the paper's released file with its alpha). -> ActorCritic, Tokenizer"""
    path = Path(path)
    run = (read_json(path / "config.json").get("run") or {}) if (path / "policy").is_dir() else {}
    base = path / run["model"] if run else path
    adapter_path = path / "policy" if run.get("lora_rank") else adapter_path
    if run and not run["lora_rank"]:
        base = path / "policy"
    places = [path / "policy", path, base, base_folder(base)]
    tokenizer = Tokenizer(tokenizer or next((p / "tokenizer.model" for p in places if (p / "tokenizer.model").is_file()),
                                            path / "tokenizer.model"))
    model = load_trunk(base, device, dtype).eval()
    tokenizer.check_fits(model.config.vocab_size, base)
    if adapter_path:
        load_lora(model, "policy", adapter_path, alpha)
    return ActorCritic(model, "policy" if adapter_path else None), tokenizer


def answer_rows(net, tokenizer, rows, where, batch=32, part=None, **settings):
    """Texts answering rows of instruction and input, in their order. settings: temperature, top_p, max_new_tokens, seed.

    A row's answer depends on the settings and on its place in the list, not on the rows beside it; it ends early where
    the model has no positions left. With `part`, a path, finished answers are kept there (JSON lines), and a call with the
    same rows and settings goes on behind them: an interrupted export continues.
    """
    prompts, room = load_prompts(where, tokenizer, rows=rows)[0], net.policy.config.max_seq_len
    too_long = [i for i, p in enumerate(prompts) if len(p) >= room]
    if too_long:
        raise ValueError(f"{where}, row {too_long[0]}: the prompt has {len(prompts[too_long[0]])} tokens, the model {room} positions")
    key = keyed_seed(json.dumps(settings), prompts)
    texts = read_part(part, key) if part else []
    for start in range(len(texts), len(rows), batch):
        ids = range(start, min(start + batch, len(rows)))
        answers = answer(net, [prompts[i] for i in ids], tokenizer, row_ids=ids, limits=[room - len(prompts[i]) for i in ids], **settings)
        texts += [tokenizer.decode_response(a) for a in answers]
        if part:
            with open(part, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(t) + "\n" for t in texts[start:])
            print(f"\r{len(texts)} of {len(rows)} answers", end="" if len(texts) < len(rows) else "\n", file=sys.stderr, flush=True)
    return texts


def read_part(part, key):
    """The answers that an interrupted call has left, or a new file that begins with the key of this call."""
    if not part.is_file():
        part.write_text(f"{key}\n", encoding="utf-8")
    lines = part.read_text(encoding="utf-8").split("\n")
    if lines[0] != str(key):
        raise ValueError(f"{part} was begun with other instructions or settings: give the same, or remove it")
    whole = lines[1:-1]                                    # (the last line has no end: empty, or cut off)
    part.write_text("\n".join([lines[0], *whole, ""]), encoding="utf-8")
    return [json.loads(line) for line in whole]


def joined_instruction(row):
    """instruction and input as alpaca_eval wants them: one text, a blank line between."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


FORMATS = {      # what the judges read: a row of ours, the answer, the name of the model -> their row
    "answers": lambda row, text, name: {"instruction": row["instruction"], "input": row.get("input", ""), "output": text},
    "alpaca_eval": lambda row, text, name: {"instruction": joined_instruction(row), "output": text, "generator": name},
    "alpacafarm": lambda row, text, name: {"instruction": row["instruction"], "input": row.get("input", ""),
                                           "output_1": row["output"], "output_2": text},
    "factscore": lambda row, text, name: {"topic": row["topic"], "output": text}}


def instructions(path, form):
    """Rows to answer. factscore: a file of names, one a line, each asked for as FActScore does; else JSON rows."""
    if form == "factscore":
        names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
        return [{"topic": name, "instruction": f"Tell me a bio of {name}."} for name in names]
    rows = read_rows(path)
    for i, row in enumerate(rows if form == "alpacafarm" else []):
        text_field(row, "output", f"{path}, row {i} (output_1 of a pair is the reference's)")
    return rows


def write_rows(path, rows, form):
    """JSON, or for factscore JSON lines, under a temporary name, then renamed."""
    if form == "factscore":
        Path(f"{path}.tmp").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        Path(f"{path}.tmp").replace(path)
    else:
        write_json(path, rows)


def save_merged(net, tokenizer, folder):
    """The policy as one Hugging Face folder, its adapter merged, with the tokenizer: AutoModelForCausalLM and AutoTokenizer
    read it (the latter needs sentencepiece and protobuf). Returns whether transformers will tokenise as we do: pieces that
    sentencepiece holds as user-defined, as the toy world's, it does not know."""
    if net.policy_adapter:
        merge_lora(net.policy, net.policy_adapter)
    save_llama(net.policy, folder)
    shutil.copy(tokenizer.path, Path(folder) / "tokenizer.model")
    names = {f"{name}_token": tokenizer.sp.id_to_piece(i) for name, i in
             (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("unk", tokenizer.unk_id)) if i >= 0}
    write_json(Path(folder) / "special_tokens_map.json", names)
    write_json(Path(folder) / "tokenizer_config.json", names | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                                                                "legacy": True, "clean_up_tokenization_spaces": False,
                                                                "model_max_length": net.policy.config.max_seq_len})
    write_json(Path(folder) / "generation_config.json", {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    return not tokenizer.has_user_defined_pieces


# ---------------------------------------------------------------------------------------------------- outside judgements

def count_preferences(preferences):
    """Judgements as alpaca_eval and AlpacaFarm write them -> win rate of output_2, its standard error, and the counts.

    1: output_1 is better, 2: output_2, 1.5 or (AlpacaFarm) 0: a draw, between 1 and 2: a leaning. A leaning counts as
    wins - 1 in the win rate, and as a win or a loss by its side; anything else (a judge that failed) is left out. The standard
    error is that of the mean, with n - 1.
    """
    valid = [1.5 if p == 0 else p for p in preferences if isinstance(p, (int, float)) and not isinstance(p, bool) and (p == 0 or 1 <= p <= 2)]
    if not valid:
        raise ValueError("no row has a preference between 1 and 2")
    wins = torch.tensor(valid, dtype=torch.float64) - 1
    return {"win_rate": wins.mean().item(), "standard_error": wins.std().item() / len(valid) ** 0.5 if len(valid) > 1 else float("nan"),
            "n_wins": int((wins > 0.5).sum()), "n_wins_base": int((wins < 0.5).sum()), "n_draws": int((wins == 0.5).sum()),
            "n_total": len(valid), "left_out": len(preferences) - len(valid)}


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
    print("An instruction a line; each is answered for itself (the template knows no dialogue). Ctrl-D ends.", file=sys.stderr)
    for turn in itertools.count():
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.strip():
            print(*answer_rows(net, tokenizer, [{"instruction": text}], "your line", **settings | {"seed": f"{args.seed} {turn}"}), "", sep="\n")


def command_export(args):
    if args.format == "merged":
        net, tokenizer, _ = load_from(args)
        if not save_merged(net, tokenizer, args.output):
            print(f"note: {tokenizer.path} has user-defined pieces, which transformers' LlamaTokenizer does not know: give the model "
                  "ids from this project's tokenizer", file=sys.stderr)
        return
    if not args.input:
        raise ValueError(f"--format {args.format} needs --input: {'names, one a line' if args.format == 'factscore' else 'JSON rows'}")
    rows = instructions(args.input, args.format)
    net, tokenizer, settings = load_from(args)
    part = Path(f"{args.output}.part")
    texts = answer_rows(net, tokenizer, rows, args.input, args.batch, part, **settings)
    name = args.generator or Path(args.run).resolve().name
    write_rows(args.output, [FORMATS[args.format](row, text, name) for row, text in zip(rows, texts)], args.format)
    part.unlink()


def command_winrate(args):
    rows = read_rows(args.file)
    if not args.reward:
        c = count_preferences([row.get("preference") if isinstance(row, dict) else None for row in rows])
        low, high = win_rate_interval(c["win_rate"], c["standard_error"])
        print(f"output_2 wins {c['win_rate']:.2%} +-{c['standard_error']:.2%} (95 % interval {low:.1%} to {high:.1%}) of {c['n_total']}: "
              f"{c['n_wins']} wins, {c['n_wins_base']} losses, {c['n_draws']} draws" + (f"; {c['left_out']} without a judgement left out" if c["left_out"] else ""))
        return
    device, dtype = device_and_dtype(args)
    trunk = load_trunk(args.model, device, dtype) if args.model else None
    reward_model = load_reward_model(args.reward, device, dtype, trunk)
    tokenizer = Tokenizer(args.tokenizer or Path(args.reward) / "tokenizer.model")
    first, second = judge_pairs(rows, args.file, reward_model, tokenizer, args.batch)
    w = win_rate_with_error(second, first)
    print(f"output_2 wins {w['value']:.2%} +-{w['se']:.2%} (95 % interval {w['low']:.1%} to {w['high']:.1%}) of {len(rows)}, judged by {args.reward}; "
          f"mean scores {mean(first):+.3f} and {mean(second):+.3f}")


def win_rate_interval(value, se):
    """Normal 95 % interval, within 0 and 1."""
    return max(0.0, value - 1.96 * se), min(1.0, value + 1.96 * se)


def command_recover(args):
    total, published = recover(args.base, args.diff, args.out, getattr(torch, args.dtype))
    print(f"{args.out}: the weights sum to {total:.4f}; " + (f"published: {published:.4f}, they agree" if published is not None
          else "the diff has no model_sum.txt, so this was not compared"))


def command_table(args):
    for folder in args.runs:
        print(folder)
        print(report(folder))


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
    p.add_argument("--batch", type=int, default=32, help="answers decoded at once (32)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: float32 on a CPU, bfloat16 on a GPU")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, help):
        p = commands.add_parser(name, help=help, allow_abbrev=False)
        p.set_defaults(command=function)
        return p

    p = command("table", command_table, "the table of finished runs")
    p.add_argument("runs", nargs="+", metavar="RUN", help="PPO run folder, such as runs/toy/ppo")
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
    p.add_argument("--input", help="JSON rows of instruction, input (alpacafarm: and output); factscore: names, one a line")
    p.add_argument("--output", required=True, help="file, or for --format merged a folder")
    p.add_argument("--generator", help="name of the model in alpaca_eval's rows (default: RUN's last part)")
    p = command("winrate", command_winrate, "win rate of output_2 over output_1 in a file of annotations or pairs")
    p.add_argument("file", metavar="FILE", help="alpaca_eval's or AlpacaFarm's annotations (preference); with --reward: pairs")
    p.add_argument("--reward", help="reward model folder that judges the pairs, instead of the file's preferences")
    p.add_argument("--model", help="the trunk of --reward, if that is an adapter")
    p.add_argument("--tokenizer", help="sentencepiece file (default: tokenizer.model of --reward)")
    p.add_argument("--batch", type=int, default=32, help="rows scored at once (32)")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    p = command("recover", command_recover, "a tuned model from LLaMA and a released weight diff")
    p.add_argument("base", metavar="LLAMA", help="folder of the model that the diff was made for")
    p.add_argument("diff", metavar="DIFF", help="folder of the weight diff, such as alpaca-farm-sft10k-wdiff")
    p.add_argument("out", metavar="OUT", help="folder to write")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the written weights")
    return parser


def main(argv=None):
    try:
        args = build_parser().parse_args(argv)
        args.command(args)
    except (ValueError, OSError) as e:
        print(f"eval.py: error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
