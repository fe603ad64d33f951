"""What all trainers share, apart from any model."""

from pyquiet.trainers import last_checkpoint


def test_the_last_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    for step, state in ((100, "{}"), (20, "{}"), (300, '{"broken'), (400, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
