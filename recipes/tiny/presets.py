"""How large each stage is: "full" for an H200 with 16 cores, or several, "trial" to measure its speed, "check" to see that
it runs there at all, "smoke" and "cpu" without a GPU.

The stages of LLaVA are packed: a batch is so many sequences of up to 1,024 tokens. One holds 11.3 samples of the first stage,
5.7 of the second and 7.9 of the third on average, so that the rows below make batches of 270 to 475 samples (64 in "check",
30 on a CPU), and can be divided among two or four GPUs. On a CPU, where attention goes over whole batches, rows follow one
another in accumulated steps.

In: a name. Out: Preset, whose fields are the extra options of the stages' commands (build.py).
"""

from __future__ import annotations

from dataclasses import dataclass

Options = tuple[str, ...]


def options(**values: object) -> Options:
    """dialogues=5, max_minutes=1.0 -> ("--dialogues", "5", "--max-minutes", "1.0"); True gives the bare flag."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return tuple(words)


def flags(**values: object) -> Options:
    """The same in the spelling of llava.train.train, with underscores."""
    return tuple(word for name, value in values.items() for word in (f"--{name}", str(value)))


@dataclass(frozen=True)
class Preset:
    arrays: Options
    held: Options
    teacher: Options
    dialogues: Options  # text for the language model
    language: Options
    clip: Options
    dataset: Options
    training: Options  # both stages of LLaVA
    stage1: Options
    stage2: Options
    second: Options  # data of the second round
    stage3: Options
    photos: int | None = None


GPU_TRAINING = flags(bf16=True, tf32=True, dataloader_num_workers=14, gradient_checkpointing=False, logging_steps=20)
CPU_TRAINING = flags(
    bf16=False, use_cpu=True, dataloader_num_workers=0, gradient_checkpointing=False, logging_steps=1,
    per_device_train_batch_size=1,
)  # fmt: skip
HELD = options(scenes=1000, signs=200, texts=1200, charts=100)

PRESETS: dict[str, Preset] = {
    # about 20 minutes; what each part took is in README.md
    "full": Preset(
        arrays=options(scenes=130_000, signs=15_000, texts=107_000, charts=8_000),
        held=HELD,
        teacher=options(steps=3600, batch=768),
        dialogues=options(dialogues=240_000),
        language=options(max_minutes=1.5),
        clip=options(max_minutes=5.5, photo_batch=752, drawn_batch=272, report_minutes=2.7),
        dataset=(
            *options(pretrain="scene=26000,sign=4000,text=24000,photo=8000,chart=3000"),
            *options(finetune="scene=310000,sign=48000,text=140000,photo=130000,chart=20000,pair=46000,talk=6000"),
        ),
        training=GPU_TRAINING,
        stage1=flags(num_train_epochs=1, per_device_train_batch_size=24, learning_rate=2e-3),
        stage2=flags(max_steps=2400, per_device_train_batch_size=80, learning_rate=1.1e-3, mm_vision_tower_lr=2.7e-4),
        second=options(second="scene=190000,sign=68000,text=210000,photo=80000,chart=12000,pair=36000,talk=4000"),
        stage3=flags(max_steps=2800, per_device_train_batch_size=60, learning_rate=6e-4, mm_vision_tower_lr=3.6e-4),
    ),
    # about 4 minutes up to "clip": shows the speed of every stage and how far a short CLIP goes
    "trial": Preset(
        arrays=options(scenes=50_000, signs=5_000, texts=50_000, charts=3_000),
        held=HELD,
        teacher=options(steps=1000, batch=768),
        dialogues=options(dialogues=60_000),
        language=options(max_minutes=0.4),
        clip=options(max_minutes=1.5, report_minutes=0.35),
        dataset=(
            *options(pretrain="scene=4000,text=4000,photo=2000,chart=200"),
            *options(finetune="scene=12000,sign=2000,text=6000,photo=5000,chart=800,pair=1900,talk=250"),
        ),
        training=GPU_TRAINING,
        stage1=flags(num_train_epochs=1, per_device_train_batch_size=24, learning_rate=2e-3),
        stage2=flags(num_train_epochs=1, per_device_train_batch_size=44, learning_rate=8e-4, mm_vision_tower_lr=2e-4),
        second=options(second="scene=7000,sign=2700,text=9500,photo=2000,chart=450,pair=1500,talk=150"),
        stage3=flags(num_train_epochs=1, per_device_train_batch_size=32, learning_rate=5e-4, mm_vision_tower_lr=3e-4),
    ),
    # a minute on a GPU: every stage at full width for a few steps, before an hour is spent on a mistake
    "check": Preset(
        arrays=options(scenes=600, signs=100, texts=600, charts=60),
        held=options(scenes=64, signs=8, texts=64, charts=8),
        teacher=options(steps=10, batch=256),
        dialogues=options(dialogues=2000),
        language=options(steps=10, checks=8),
        clip=options(steps=6),
        dataset=(
            *options(pretrain="scene=300,sign=50,text=300,photo=200"),
            *options(finetune="scene=400,sign=60,text=200,photo=160,chart=30,pair=60,talk=10"),
        ),
        training=GPU_TRAINING,
        stage1=flags(num_train_epochs=1, per_device_train_batch_size=6, learning_rate=1e-3),
        stage2=flags(num_train_epochs=1, per_device_train_batch_size=10, learning_rate=1e-4, mm_vision_tower_lr=1e-5),
        second=options(second="scene=240,sign=90,text=320,photo=70,chart=20,pair=50,talk=10"),
        stage3=flags(num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-4, mm_vision_tower_lr=1e-5),
        photos=2000,
    ),
    # some hours on a desktop's cores: a weaker model by the same road
    "cpu": Preset(
        arrays=options(scenes=20_000, signs=3_000, texts=20_000, charts=1_000),
        held=HELD,
        teacher=options(steps=1500, batch=128, width=24),
        dialogues=options(dialogues=20_000),
        language=(*options(steps=1500, batch=16, max_minutes=30), "--no-compile"),
        clip=(*options(steps=4000, photo_batch=64, drawn_batch=64, max_minutes=90), "--no-compile"),
        dataset=(
            *options(pretrain="scene=3000,text=3000,photo=2000", suffix=".png"),
            *options(finetune="scene=17000,sign=3000,text=9000,photo=8000,chart=1000,pair=2500,talk=400"),
        ),
        training=CPU_TRAINING,
        stage1=flags(num_train_epochs=1, gradient_accumulation_steps=3, learning_rate=2e-3),
        stage2=flags(num_train_epochs=1, gradient_accumulation_steps=5, learning_rate=8e-4, mm_vision_tower_lr=2e-4),
        second=options(second="scene=9000,sign=3500,text=12000,photo=2700,chart=600,pair=1900,talk=200", suffix=".png"),
        stage3=flags(num_train_epochs=1, gradient_accumulation_steps=3, learning_rate=5e-4, mm_vision_tower_lr=3e-4),
    ),
    # a few minutes on two cores: proves that every stage runs, and learns nothing
    "smoke": Preset(
        arrays=options(scenes=60, signs=10, texts=60, charts=10),
        held=options(scenes=24, signs=4, texts=24, charts=4),
        teacher=options(steps=4, batch=32, width=8),
        dialogues=options(dialogues=200),
        language=(
            *options(steps=6, batch=4, length=128, width=64, layers=2, mlp=128, checks=4),
            "--no-compile",
        ),
        clip=(*options(steps=4, photo_batch=8, drawn_batch=8, layers=2, width=64), "--no-compile"),
        dataset=(
            *options(pretrain="scene=8,sign=2,text=8,photo=6", suffix=".png"),
            *options(finetune="scene=12,sign=4,text=8,photo=8,chart=4,pair=4,talk=4"),
        ),
        training=CPU_TRAINING,
        stage1=flags(num_train_epochs=1, learning_rate=1e-3),
        stage2=flags(num_train_epochs=1, learning_rate=1e-4, mm_vision_tower_lr=1e-5),
        second=options(second="scene=6,sign=4,text=8,photo=4,chart=2,pair=4,talk=2", suffix=".png"),
        stage3=flags(num_train_epochs=1, learning_rate=1e-4, mm_vision_tower_lr=1e-5),
        photos=100,
    ),
}
