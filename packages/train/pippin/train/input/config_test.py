import subprocess
import sys

import pytest

from pippin.core.component import from_text, to_text
from pippin.core.config_tree import override
from pippin.core.errors import ConfigError
from pippin.train.input.config import (
    BadInput,
    FilesConfig,
    MixtureConfig,
    SentencePieceConfig,
    StdlibConfig,
    TaskConfig,
    TextInputConfig,
    TokenizerFilesConfig,
    use_files,
)


def test_a_tree_comes_back_from_its_text() -> None:
    cfg = TextInputConfig(
        mixture=MixtureConfig(
            tasks=(
                TaskConfig(name="code"),
                TaskConfig(name="web", source=FilesConfig(glob="*.jsonl"), rate=3.0),
            )
        ),
        tokenizer=TokenizerFilesConfig(directory="t"),
        batch_size=8,
        sequence_length=128,
        bad_input=BadInput.FATAL,
        heldout_rows=None,
    )
    assert from_text(to_text(cfg)) == cfg


def test_files_of_ones_own_replace_the_mixture() -> None:
    cfg = use_files("a/*.txt", "body")(TextInputConfig(batch_size=8, sequence_length=128))
    assert isinstance(cfg, TextInputConfig)
    own = FilesConfig(glob="a/*.txt", text_field="body")
    assert cfg.mixture.tasks == (TaskConfig(name="files", source=own),)


def test_a_source_is_chosen_by_its_name() -> None:
    cfg = override(
        TextInputConfig(),
        {
            "mixture.tasks.0.source": "Files",
            "mixture.tasks.0.source.glob": "*.txt",
            "tokenizer.vocab_size": "512",
        },
    )
    assert cfg.mixture.tasks[0].source == FilesConfig(glob="*.txt")
    assert cfg.tokenizer == SentencePieceConfig(vocab_size=512)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskConfig(name="a b"), "TaskConfig.name got 'a b'. Use letters"),
        (lambda: TaskConfig(name="a", rate=0.0), "rate of 'a' is 0.0. Give it a rate above 0"),
        (lambda: MixtureConfig(tasks=()), r"tasks are named \[\]. Give it one task or more"),
        (lambda: MixtureConfig(tasks=(TaskConfig(name="a"),) * 2), r"named \['a', 'a'\]"),
        (lambda: TextInputConfig(batch_size=0), "batch_size is 0. Set it to 1 or more"),
        (lambda: TextInputConfig(sequence_length=1), "sequence_length is 1. Set it to 2 or more"),
        (lambda: TextInputConfig(sequence_length=1 << 17), "at most 65535 tokens"),
        (lambda: TextInputConfig(heldout_every=1), "heldout_every is 1. Set it to 2 or more"),
        (
            lambda: TextInputConfig(tokenizer=StdlibConfig()),
            "takes a component that provides 'tokenizer_source'",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_configs_need_neither_jax_nor_tensorflow() -> None:
    code = (
        "import sys, pippin.train.input.config\n"
        "assert not {'jax', 'tensorflow', 'seqio', 'numpy', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
