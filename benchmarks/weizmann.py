"""Does pretraining help on genuine videos? Weizmann actions: 60 train and 30 test clips, 10 classes, split by person.

    python benchmarks/weizmann.py --data WEIZMANN                     three seeds, two processes, ZeRO-1: about 20 minutes on two cores
    python benchmarks/weizmann.py --data WEIZMANN --seeds 1 --epochs 2 --transfer-epochs 1       that it runs: 3 minutes

For each seed: pretrain on the train clips, finetune from that and from scratch with the same budget, and retrieval by the frozen
features against random ones. Prints a table, writes results/weizmann.json and the table in docs/LOG.md. What is already in the work
folder is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "weizmann.json"
LOG = ROOT / "docs" / "LOG.md"
BEGIN, END = "<!-- benchmarks/results/weizmann.json -->\n", "<!-- end -->\n"  # the table in LOG stands between them
CLIPS = ["--preset", "demo", "--clip-length", "8", "--clip-stride", "2", "--crop-size", "48"]


def deepspeed(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "train.py", *arguments]


def plan(data: str, work: Path, seed: int, epochs: int, transfer_epochs: int) -> list[tuple[Path, list[str]]]:
    """(folder that will hold report.json, command) of one seed, in order."""
    pretrained, random = work / f"pretrain-{seed}", work / f"random-{seed}"
    common = ["--data", data, "--seed", str(seed), *CLIPS, "--ds_config", "ds_configs/zero1.json"]
    drops = [str(epochs * 3 // 4), str(epochs * 9 // 10)]
    long = ["--epochs", str(epochs), "--milestones", *drops, "--checkpoint-every", str(max(1, epochs // 4))]
    steps = [
        (
            pretrained,
            deepspeed("pretrain", *common, *long, "--batch-size", "20", "--fill-steps", "26", "--out", str(pretrained)),
        )
    ]
    for name, start in (("finetune", ["--pretrained", str(pretrained)]), ("scratch", [])):
        folder = work / f"{name}-{seed}"
        drops = [str(transfer_epochs * 6 // 10), str(transfer_epochs * 8 // 10)]
        budget = ["--epochs", str(transfer_epochs), "--milestones", *drops, "--batch-size", "20", "--lr", "0.05"]
        budget += ["--checkpoint-every", str(transfer_epochs)]
        steps.append((folder, deepspeed("finetune", *common, *budget, *start, "--out", str(folder))))
        evaluate = [sys.executable, "eval.py", "accuracy", "--data", data, "--checkpoint", str(folder)]
        steps.append((folder / "accuracy", evaluate))
    retrieve = [sys.executable, "eval.py", "retrieval", "--data", data]
    steps.append((pretrained / "retrieval", [*retrieve, "--checkpoint", str(pretrained)]))
    out = random / "retrieval"
    steps.append((out, [*retrieve, "--checkpoint", "random", *CLIPS, "--seed", str(seed), "--out", str(out)]))
    return steps


def figures(work: Path, seeds: int) -> dict[str, dict[str, Any]]:
    """What is reported: by name, the values by seed, their mean, standard deviation over seeds and chance."""
    rows = (
        ("finetuned from DCLR, top-1 by video", "finetune-{}/accuracy", "top1_video", "chance_top1"),
        ("from scratch, top-1 by video", "scratch-{}/accuracy", "top1_video", "chance_top1"),
        ("DCLR features, retrieval R@1", "pretrain-{}/retrieval", "recall_at_1", "chance_at_1"),
        ("random features, retrieval R@1", "random-{}/retrieval", "recall_at_1", "chance_at_1"),
    )
    found = {}
    for title, folder, name, chance in rows:
        reports = [
            json.loads((work / folder.format(seed) / "report.json").read_text())["figures"] for seed in range(seeds)
        ]
        values = [report[name] for report in reports]
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        found[title] = {
            "values": values,
            "mean": statistics.mean(values),
            "stdev": spread,
            "chance": reports[0][chance],
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| figure | mean | spread (s.d.) | by seed | chance |", "|---|---|---|---|---|"]
    for title, row in found.items():
        by_seed = ", ".join(f"{value:.1%}" for value in row["values"])
        lines.append(f"| {title} | {row['mean']:.1%} | {row['stdev']:.1%} | {by_seed} | {row['chance']:.1%} |")
    return "\n".join(lines)


def with_table(text: str, found: dict[str, dict[str, Any]]) -> str:
    """The page `text` with the table of these figures in its place."""
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + table(found) + "\n" + END + rest.split(END, 1)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder with splits/train.txt and test.txt")
    parser.add_argument("--work", default="runs/weizmann", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=160, help="of pretraining")
    parser.add_argument("--transfer-epochs", type=int, default=40, help="of finetuning and of training from scratch")
    parser.add_argument("--result", type=Path, default=RESULT, help="the JSON file to write")
    arguments = parser.parse_args()
    data, work = str(Path(arguments.data).resolve()), (ROOT / arguments.work).resolve()

    for seed in range(arguments.seeds):
        for folder, command in plan(data, work, seed, arguments.epochs, arguments.transfer_epochs):
            if (folder / "report.json").exists():
                continue
            print(" ".join(command), flush=True)
            subprocess.run(command, cwd=ROOT, check=True)

    found = figures(work, arguments.seeds)
    pretraining = json.loads((work / "pretrain-0" / "report.json").read_text())
    content = {
        "question": "does pretraining help on genuine videos (Weizmann actions, split by person)?",
        "command": f"python benchmarks/weizmann.py --seeds {arguments.seeds} --epochs {arguments.epochs} "
        f"--transfer-epochs {arguments.transfer_epochs}",
        "network": {
            name: json.loads((work / "pretrain-0" / "config.json").read_text())[name]
            for name in ("model", "method", "optim")
        },
        "processes": pretraining["processes"],
        "precision": pretraining["precision"],
        "pretraining_seconds": pretraining["seconds"],
        "environment": pretraining["environment"],
        "figures": found,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.result == RESULT:
        LOG.write_text(with_table(LOG.read_text(), found))
    print(table(found))


if __name__ == "__main__":
    main()
