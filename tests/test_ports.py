"""What `fit` takes, this takes: ports of Keras' kinds of scripts, and docs/bring_your_own.md.

Each is trained straight, and killed twice at random steps and continued, to the same bytes; then it
is evaluated, exported and made again.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from fault_lab import MOMENTS, Job, Lab, opened
from test_docs import IN_TEMPLATE, Block, blocks_of, commands_of

PORTS = Path(__file__).with_name("ports")
PAGE = IN_TEMPLATE / "docs" / "bring_your_own.md"
MARK = "# ---- ported "

# What is typed in addition to the names of data and model.
FLAGS: dict[str, tuple[str, ...]] = {
    "transformer": (),
    "weather": ("--loss=mse", "--metrics=[mae]", "--monitor=val_mae"),
    "segmentation": ("--monitor=val_iou",),
    "structured": ("--monitor=val_auc",),
    "many_outputs": ("--monitor=val_department_accuracy",),
    "diffusion": ("--monitor=val_i_loss",),
    "contrastive": ("--monitor=val_p_acc",),
    "distillation": ("--warm_start=TEACHER", "--warm_start_vars=teacher.*"),
    "ctc": (),
    "dqn": ("--monitor=loss",),
}
# What cannot be done, and what is said of it.
REFUSED = {
    ("vae", "evaluate"): "no metrics: they need a test_step",
    ("digits_gan", "evaluate"): "give its Dataset a load_test",
    ("dqn", "export"): "iterator",
    ("corridor", "evaluate"): "it has train",
    ("corridor", "export"): "iterator",
}
NEEDS_TORCH = "torch_net"  # test_torch has it


def examples() -> dict[str, list[Block]]:
    """Return the blocks of the page that belong into files, by the stem of the file."""
    found: dict[str, list[Block]] = {}
    for block in blocks_of(PAGE):
        if block.file:
            found.setdefault(Path(block.file).stem, []).append(block)
    return found


def commands() -> dict[str, tuple[str, ...]]:
    """Return what the page types to train, without the folder, by the name of the folder."""
    typed = [c.text for b in blocks_of(PAGE) if not b.language for c in commands_of(b)]
    words = [shlex.split(text.replace("\\\n", "")) for text in typed]
    trained = [each[2:] for each in words if each[1] == "bin/train.py"]
    return {Path(folder).name: (config, *flags) for config, folder, *flags in trained}


def job_of(kind: str, lab: Lab) -> Job:
    """Return a port or an example as a run to break."""
    if kind not in FLAGS:
        words = [word for word in commands()[kind] if not word.startswith("--num_epochs")]
    elif (PORTS / f"{kind}.yaml").exists():
        words = [kind, *FLAGS[kind]]
    else:
        named = [f"--dataset={kind}:data", f"--model={kind}:build", "--checkpoint_steps=4"]
        words = ["root", *named, *FLAGS[kind]]
    if kind == "distillation":
        teaches = (*words[:2], f"--model={kind}:build_teacher", "--no_tensorboard")
        teacher = str(lab.reference(Job("teacher", teaches)))
        words = [word.replace("TEACHER", teacher) for word in words]
    return Job(kind, (*words, "--no_tensorboard"))


@pytest.fixture(scope="module")
def lab(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A project with all ports and examples."""
    with opened(project, tmp_path_factory.mktemp("lab")) as lab:
        for file in PORTS.iterdir():
            shutil.copy(file, lab.project / ("configs" if file.suffix == ".yaml" else "src"))
        for blocks in examples().values():
            for block in blocks:
                with open(lab.project / block.file, "a") as target:
                    target.write(block.content)
        yield lab


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FLAGS, *(name for name in commands() if name != NEEDS_TORCH)])
def test_it_is_trained_continued_evaluated_exported_and_made_again(kind: str, lab: Lab) -> None:
    job, chance = job_of(kind, lab), random.Random(kind)
    has_iterator = "iterator" in json.loads((lab.reference(job) / "config.json").read_text())
    places = [{"call": chance.randint(2, 12), "when": chance.choice(MOMENTS)} for _ in range(2)]
    fault = {"at": "iterator_step" if has_iterator else "step"}
    kills = [{"faults": [fault | place], "most_steps": 1} for place in places]
    assert lab.chain(job, kills, kind) == 2

    # As it is: the lab makes the first steps in another way.
    run, exported = (lab.new_folder(kind) for _ in range(2))
    config, *flags = job.arguments
    commands = [("train", config, str(run), *flags), ("evaluate", str(run))]
    commands += [("export", str(run), str(exported)), ("reproduce", str(run))]
    said = {}
    for program, *words in commands:
        done = forked.run([f"bin/{program}.py", *words], lab.project, os.environ)
        said[program] = done.stdout + done.stderr
        expected = REFUSED.get((kind, program))
        assert done.returncode == (2 if expected else 0), said[program]
        assert (expected or "") in said[program]
        assert "Traceback" not in said[program]
    assert "identical bit for bit: history.csv" in said["reproduce"]


def test_a_port_costs_few_lines() -> None:
    for kind in FLAGS:
        script, _, ported = (PORTS / f"{kind}.py").read_text().partition(MARK)
        own = [line for line in script.splitlines() if line.startswith(("from src", "from engine"))]
        added = [line for line in ported.splitlines()[1:] if line]
        config = PORTS / f"{kind}.yaml"
        added += config.read_text().splitlines() if config.exists() else []
        assert len(own + added) <= 15, kind


def test_an_example_has_few_lines() -> None:
    for name, (block, *_) in examples().items():
        assert len([line for line in block.content.splitlines() if line]) <= 25, name
