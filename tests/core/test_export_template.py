"""An exported directory has the chat template of its source: a model is served with what it was trained with."""

import shutil

from tests.helpers import small


def _export(directory, out):
    small.learner(directory, {}, train=False).export(out)


def test_an_export_carries_the_chat_template(ranks, hf_dirs, tmp_path):
    shutil.copytree(hf_dirs[True], tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ranks.run(_export, tmp_path / "hf", tmp_path / "out", world=1)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
