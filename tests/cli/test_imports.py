"""What importing and starting costs: which modules are loaded, and that shortcuts change nothing but time."""

from __future__ import annotations

import json

import pytest
import torch
from cli_kit import run_llava, run_python
from golden_data import golden

import llava

HEAVY = ("torch", "transformers", "numpy", "PIL", "peft", "accelerate", "sentencepiece")


def loaded_by(code: str) -> list[str]:
    """The heavy modules that are loaded in a new process once it has run `code`."""
    report = f"import sys; print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = run_python("-c", f"{code}\n{report}")
    assert done.returncode == 0, done.stderr
    return done.stdout.rsplit("LOADED", 1)[1].split()


@pytest.mark.parametrize(
    "code",
    [
        "import llava",
        "import llava.constants, llava.errors, llava.cli.program, llava.cli.startup, llava.utils",
        "import llava.engine, llava.engine.request, llava.engine.config, llava.engine.kv_cache",
        "import llava.conversation, llava.images.layout, llava.images.io",
        "import llava.serve.cli, llava.cli.chat",
        "import llava.train.train, llava.train.train_mem",
        "import llava.mm_utils, llava.eval.run_llava, llava.eval.model_vqa_loader, llava.eval.model_vqa_mmbench",
        "import llava.eval.m4c_evaluator, llava.eval.eval_gpt_review_bench, llava.eval.eval_pope, llava.eval.eval_textvqa",
        "import llava.serve.controller, llava.serve.model_worker, llava.serve.gradio_web_server",
        "from llava.__main__ import main; assert main(['--help']) == 0",
        "from llava.__main__ import main; assert main(['--version']) == 0",
        "from llava.__main__ import main; assert main(['cht']) == 2",
        "from llava.cli.chat import build_parser; build_parser().format_help()",
        "from llava.convert.program import build_parser; build_parser().format_help()",
        "from llava.__main__ import main; assert main(['info', 'checkpoints/llava-v1.5-tiny-vicuna']) == 0",
        "from llava.__main__ import main; assert main(['info', 'checkpoints/llava-v1.5-tiny-lora', '--json']) == 0",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded_by(code) == []


def test_public_names_are_there() -> None:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    assert llava.LlavaLlamaForCausalLM is LlavaLlamaForCausalLM
    for name in llava.__all__:
        assert getattr(llava, name) is not None
        assert name in dir(llava)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llava.no_such_name


def test_names_that_training_borrows_are_where_it_says() -> None:
    from llava.train import train

    for home, names in train.EXPORTS.items():
        for name in names:
            assert getattr(train, name).__module__ == home
            assert name in dir(train)
    exported = {name for names in train.EXPORTS.values() for name in names}
    assert set(train.__all__) == {*exported, "main", "rank0_print", "train"}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = train.no_such_name


def test_version_is_the_package_s() -> None:
    done = run_llava("--version")
    assert done.stdout.splitlines()[0] == f"llava {llava.__version__}"
    assert f"torch {torch.__version__}" in done.stdout
    project = (golden("").parents[1] / "pyproject.toml").read_text()
    assert f'version = "{llava.__version__}"' in project


def test_quick_imports_give_the_same_modules() -> None:
    """What is deferred works when asked for, and the list of models is the one that transformers makes itself."""
    done = run_python(
        "-c",
        """
import gc, json, sys
from llava.cli.startup import prepare, quick_imports
prepare()
with quick_imports():
    assert not gc.isenabled()
    import transformers.models.llama.modeling_llama, transformers.models.clip.modeling_clip, transformers.trainer_utils
import torch, transformers
assert gc.isenabled()
body = "torch._dynamo.convert_frame"
before = body in sys.modules or "bitsandbytes.functional" in sys.modules
from transformers.utils import import_utils
assert import_utils.define_import_structure.__module__ == import_utils.__name__
plain = import_utils.define_import_structure(transformers.models.__file__)
listed = transformers.models._class_to_module
missing = [name for modules in plain.values() for names in modules.values() for name in names if name not in listed]
marked = torch.compiler.disable(lambda value: value + 1)  # runs the body
compiled = torch.compile(lambda value: value * 2 + 1, backend="eager")
print(json.dumps({
    "before": before,
    "missing": missing,
    "marked": marked(1),
    "compiled": compiled(torch.ones(2)).tolist(),
    "after": body in sys.modules,
    "kind": type(sys.modules["torch._dynamo"]).__name__,
    "quantized": sys.modules["bitsandbytes"].nn.Linear4bit.__name__,
}))
""",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "before": False,
        "missing": [],
        "marked": 2,
        "compiled": [3.0, 3.0],
        "after": True,
        "kind": "module",
        "quantized": "Linear4bit",
    }


def test_a_deferred_package_runs_its_body_once_and_first(tmp_path) -> None:
    package = tmp_path / "outer" / "slow"
    package.mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "print('body')\nfrom . import needy\ndef mark(f):\n    print('marked', f.__name__)\n    return f\nvalue = 7\n"
    )
    (package / "needy.py").write_text("print('needy')\n")
    (package / "free.py").write_text("print('free')\n")
    program = (
        "import outer\nfrom llava.cli.startup import defer\n"
        "defer('outer.slow', marks=('mark',), free=('free',))\n"
        "import outer.slow\nimport outer.slow.free\n"
        "@outer.slow.mark\ndef early(): pass\n"
        "print('waiting')\n"
        "{use}\n"
        "import outer.slow.needy\nassert outer.slow.value == 7 and outer.slow.needy.__spec__.loader is not None\n"
    )
    expected = ["free", "waiting", "body", "needy", "marked early"]
    for use in ("outer.slow.value", "import outer.slow.needy", "from outer.slow import value"):
        done = run_python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + program.replace("{use}", use))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == expected, use


def test_messages_and_constants_are_the_recorded_ones() -> None:
    from llava import constants, utils

    recorded = json.loads(golden("cli/recorded.json").read_text())["constants"]
    del recorded["Exceeds_message"]  # a worker's reply, not a name to import
    assert {name: getattr(utils, name, getattr(constants, name, None)) for name in recorded} == recorded


def test_disable_torch_init_ends_with_its_block() -> None:
    from llava.utils import disable_torch_init

    original = torch.nn.Linear.reset_parameters
    with disable_torch_init():
        assert torch.nn.Linear.reset_parameters is not original
        torch.nn.Linear(2, 2)
    assert torch.nn.Linear.reset_parameters is original
