"""Every error that this library raises on purpose: each has a trigger, and says what is wrong and what to do."""

from __future__ import annotations

import pickle

import pytest

import emma_adapter
from emma_adapter import EmmaError, errors
from tests.support.raising import ROOT, TRIGGERS, Bench, Trigger, all_sites

SITES = [site for site in all_sites() if site.is_ours]
CLASSES = [value for value in vars(errors).values() if isinstance(value, type)]
#: What is no error of this library by design: others catch it, or print it.
FOREIGN = {
    "emma_adapter/__init__.py": {"AttributeError"},  # as any module's
    "emma_adapter/files/atomic.py": {
        "NotADirectoryError",
        "IsADirectoryError",
        "OSError",
    },  # as any error of a folder is
    "emma_adapter/checkpoints/base_model.py": {"_would_replace_a_model"},  # a FileExistsError: likewise
    "emma_adapter/files/tensor_file.py": {"ValueError"},  # caught there: what is wrong with a header
    "emma_adapter/experts/hooks.py": {"_EnoughError"},  # caught there: nothing more is to be computed
    "emma_adapter/cli/finetune.py": {"click.UsageError", "click.BadParameter"},  # printed with the command's usage
    "emma_adapter/cli/training.py": {"click.UsageError"},  # likewise
    "emma_adapter/cli/train_alignment.py": {"click.UsageError"},  # likewise
    "emma_adapter/cli/train_unified.py": {"click.UsageError"},  # likewise
    "emma_adapter/cli/evaluate_drawing.py": {"click.UsageError"},  # likewise
    "emma_adapter/cli/report.py": {"click.UsageError"},  # likewise
    "emma_adapter/cli/options.py": {"click.UsageError"},  # likewise
    "emma_adapter/alignment/official_weights.py": {"_ForeignPickleError"},  # caught there: what is wrong with a pickle
    "emma_adapter/checkpoints/writing.py": {"FileExistsError"},  # likewise
    "emma_adapter/files/untrusted.py": {"ValueError"},  # of a JSON text, as json's own
    "integrations/lmms_eval.py": {"NotImplementedError"},  # how lmms-eval asks what a model can't do
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


def test_every_error_has_a_trigger():
    """An error that nobody can cause is dead code, and one that nobody has seen may say anything."""
    without = [site for site in SITES if not any(trigger.means(site) for trigger in TRIGGERS)]
    assert without == [], "give each one in tests/support/raising"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.do.__name__)
def test_a_mistake_gets_the_error_that_explains_it(trigger: Trigger, bench):
    [site] = [site for site in SITES if trigger.means(site)]
    with pytest.raises(EmmaError) as caught:
        trigger.do(bench)
    assert type(caught.value) is trigger.error
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1 in site.lines) == (str(ROOT / site.path), True), caught.value
    _check_words(str(caught.value))


def _check_words(message: str) -> None:
    """That it can be read: neither empty nor endless, and made of what the user knows."""
    assert 20 <= len(message) <= 1500, message
    assert " at 0x" not in message
    assert "Traceback" not in message
    assert message == message.strip()


def test_triggers_are_named_once():
    names = [trigger.do.__name__ for trigger in TRIGGERS]
    assert len(names) == len(set(names))


def test_no_other_error_is_raised_on_purpose():
    others = {(site.path, site.raised) for site in all_sites() if not site.is_ours}
    assert others == {(path, name) for path, names in FOREIGN.items() for name in names}


@pytest.mark.parametrize("error", CLASSES)
def test_the_family_is_complete_and_public(error):
    assert issubclass(error, EmmaError)
    assert getattr(emma_adapter, error.__name__) is error
    assert error.__name__ in emma_adapter.__all__
    builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
    assert error is EmmaError or builtin[0] in (ValueError, RuntimeError)


@pytest.mark.parametrize("error", CLASSES)
def test_errors_survive_another_process(error):
    """A DataLoader's worker, for one, hands them on."""
    made = pickle.loads(pickle.dumps(error("what is wrong: what to do")))
    assert type(made) is error
    assert str(made) == "what is wrong: what to do"
