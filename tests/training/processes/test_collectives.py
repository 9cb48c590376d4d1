"""What ranks tell each other: a single rank, and three over gloo."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import DataError, about
from tests.training import forks
from training.config.experiment import Experiment
from training.engine.start import init_distributed, shut_down
from training.processes import collectives
from training.processes.ranks import Ranks, read_ranks


def test_together_raises_the_error_of_rank_0() -> None:
    assert collectives.together(lambda: 7, Ranks()) == 7
    with pytest.raises(ValueError, match="no"):
        collectives.together(lambda: (_ for _ in ()).throw(ValueError("no")), Ranks())


def said(call: Any) -> str:
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(config: Experiment) -> dict[str, Any]:
    """One rank's answers."""
    ranks = read_ranks()
    assert ranks is not None
    ranks = init_distributed(ranks, config)
    me = ranks.rank

    def failing(*who: int) -> int:
        if me in who:
            raise DataError(f"rank {me} cannot")
        return me

    def between(who: int) -> list[Any]:
        team = collectives.RankTeam(ranks)
        first = collectives.together(lambda: 5, ranks), team.everyone(lambda: me)
        if me == who:
            raise DataError(f"rank {me} cannot go on")
        with about("data.shards"):
            return [*first, team.once(lambda: 6), collectives.together(lambda: 7, ranks)]

    answers = {
        "rows": collectives.gather_rows(torch.full((2, 3), me), ranks).tolist(),
        "bytes": [data.decode() for data in collectives.gather_bytes(f"<{me}>".encode(), ranks)],
        "json": collectives.gather_json({"rank": me, "long": "x" * 100 * me}, ranks),
        "from main": collectives.from_main(torch.tensor([[me + 5, me]]), ranks).tolist(),
        "together": collectives.together(lambda: {"rank": me, "nan": math.nan, "text": "ä"}, ranks),
        "nothing": collectives.together(lambda: None, ranks),
        "together fails": said(lambda: collectives.together(lambda: failing(0), ranks)),
        "each": collectives.each(lambda: failing(), ranks),
        "each fails": said(lambda: collectives.each(lambda: failing(1, 2), ranks)),
        "within": collectives.each(lambda: between(-1), ranks),
        "within fails": [said(lambda who=who: collectives.each(lambda: between(who), ranks)) for who in range(3)],
        "within fails at once": said(
            lambda: collectives.each(lambda: collectives.together(lambda: failing(0), ranks), ranks)
        ),
        "sum": collectives.all_sum([1.0, me], ranks),
        "no errors": collectives.errors_of_all(None, ranks),
        "objects": collectives.gather_objects({me}, ranks) == [{0}, {1}, {2}],
    }
    collectives.barrier(ranks)
    Path(config.run.dir, f"answers-{me}.json").write_text(json.dumps(answers))
    shut_down()
    return {}


def test_three_ranks_tell_each_other(tmp_path: Path) -> None:
    config = Experiment()
    config.run.dir = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    running = forks.start(config, 3, "tests.training.processes.test_collectives")
    assert running.codes() == [0] * 3, running.text
    for rank in range(3):
        answers = json.loads((tmp_path / "run" / f"answers-{rank}.json").read_text())
        keys = ["" if who == rank else "data.shards: " for who in range(3)]
        assert math.isnan(answers["together"].pop("nan"))
        assert answers == {
            "rows": [[0] * 3, [0] * 3, [1] * 3, [1] * 3, [2] * 3, [2] * 3],
            "bytes": ["<0>", "<1>", "<2>"],
            "json": [{"rank": r, "long": "x" * 100 * r} for r in range(3)] if rank == 0 else [],
            "from main": [[5, 0]],
            "together": {"rank": 0, "text": "ä"},
            "nothing": None,
            "together fails": "DataError: rank 0 cannot",
            "each": rank,
            "each fails": "DataError: rank 1 cannot",
            "within": [5, [0, 1, 2], 6, 7],
            "within fails": [f"DataError: {key}rank {who} cannot go on" for who, key in enumerate(keys)],
            "within fails at once": "DataError: rank 0 cannot",
            "sum": [3.0, 3.0],
            "no errors": [],
            "objects": True,
        }
