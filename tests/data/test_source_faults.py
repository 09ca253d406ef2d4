"""An index that is lost is told with the commands that bring it back; a file system that fails for now is told as that."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from indexing import TOKENIZER
from tars import make_pairs, write_tar

from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.samples import Kind
from data_pipeline.shards.index import index_shard, read_facts, read_index, sidecar_path
from data_pipeline.shards.merge import merge
from data_pipeline.shards.select import select
from data_pipeline.shards.source import ShardSource
from data_pipeline.text.tokenizer import Tokenizer

READS: dict[str, Callable[[ShardSource], object]] = {
    "kept": lambda source: source.kept(0, 2),
    "rows": lambda source: source.locate(1),
    "elements": lambda source: source.elements(np.arange(3)),
    "blocks": lambda source: ShardSource("s", source.path, source.index_dir),
}


@pytest.fixture(params=["beside the shards", "elsewhere"])
def source(request, tmp_path, demo, xc_data) -> ShardSource:
    """A source of one shard, indexed and merged."""
    folder = write_tar(tmp_path / "shards" / "a.tar", make_pairs(4)).parent
    index_dir = folder if request.param == "beside the shards" else tmp_path / "index"
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer, "--index-dir", index_dir) == 0
    assert xc_data("merge", folder, "--index-dir", index_dir) == 0
    return ShardSource("s", folder, index_dir)


@pytest.fixture
def cured(xc_data, demo) -> Callable[[Exception], None]:
    """Runs the commands that an error names."""

    def run(error: Exception) -> None:
        assert "\n" not in str(error)
        commands = re.findall(r"xc-data ((?:index|merge) [^,;)]*)", str(error))
        assert commands
        for command in commands:
            assert xc_data(*command.replace("FOLDER", str(demo.tokenizer)).split()) == 0

    return run


def column(source: ShardSource, name: str) -> Path:
    return source.index_dir / source.facts.columns / f"{name}.bin"


def chosen(source: ShardSource, folder: Path) -> None:
    select(source.path, source.index_dir, "true", ["near-image"], 4, "", folder)


def lose_merge(source: ShardSource) -> None:
    (source.index_dir / "source.json").unlink()


def lose_sidecar(source: ShardSource) -> None:
    sidecar_path(source.path / "a.tar", source.index_dir).unlink()


def change_shard(source: ShardSource) -> None:
    write_tar(source.path / "a.tar", make_pairs(40))


def index_again(source: ShardSource) -> None:
    change_shard(source)
    index_shard(source.path / "a.tar", source.index_dir, Kind.pair, TOKENIZER)


def keep(source: ShardSource) -> None:
    pass


@pytest.mark.parametrize("name", READS)
def test_a_deleted_column_is_told_with_the_commands_that_make_it_again(source, cured, name):
    column(source, name).unlink()
    with pytest.raises(UserError, match=rf"no \S+{name}\.bin") as raised:
        READS[name](source)
    cured(raised.value)
    READS[name](source)


@pytest.mark.parametrize(
    ("fault", "use"),
    [
        (lose_merge, lambda s, _: ShardSource("s", s.path, s.index_dir)),
        (lose_sidecar, lambda s, _: s.key(0)),
        (lose_sidecar, lambda s, _: merge(s.path, s.index_dir)),
        (change_shard, lambda s, _: merge(s.path, s.index_dir)),
        (index_again, chosen),
        (keep, chosen),
    ],
    ids=["no merge", "no sidecar", "merge without sidecar", "merge of a changed shard", "not merged since", "no hashes"],
)
def test_the_cure_works_wherever_the_index_is(source, tmp_path, cured, fault, use):
    fault(source)
    with pytest.raises(UserError) as raised:
        use(source, tmp_path / "selection")
    cured(raised.value)
    if use is chosen and "perceptual" not in str(raised.value):
        with pytest.raises(UserError, match="perceptual"):
            use(source, tmp_path / "selection")
    else:
        use(source, tmp_path / "selection")


def test_another_tokenizer_is_cured_by_what_is_said(source, cured, demo):
    with pytest.raises(UserError, match="indexed with another tokenizer") as raised:
        source.require_tokenizer("0" * 64)
    cured(raised.value)
    ShardSource("s", source.path, source.index_dir).require_tokenizer(Tokenizer(demo.tokenizer).digest)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("where", ["open", "read"])
def test_a_column_that_cannot_be_read_now_is_to_be_tried_again(source, name, where):
    fail(column(source, name), where)
    with pytest.raises(TryAgainError, match=rf"cannot read \S+{name}\.bin: (Is a directory|Too many levels)"):
        READS[name](source)


def fail(file: Path, where: str) -> None:
    """In place of a file that the system cannot read for now: one that no right opens, or none reads."""
    file.unlink()
    file.symlink_to(file) if where == "open" else file.mkdir()


def test_an_index_that_cannot_be_read_now_is_not_a_lost_one(source, tmp_path):
    select(source.path, source.index_dir, "true", [], 4, "", tmp_path / "selection")
    sidecar = sidecar_path(source.path / "a.tar", source.index_dir)
    fail(sidecar, "open")
    for read in (read_facts, read_index):
        with pytest.raises(TryAgainError, match=r"a\.index\.parquet: .*Too many levels"):
            read(sidecar)
    fail(tmp_path / "selection" / "blocks.bin", "open")
    with pytest.raises(TryAgainError, match="Too many levels"):
        ShardSource("s", source.path, source.index_dir, tmp_path / "selection")
    fail(source.index_dir / "source.json", "open")
    with pytest.raises(TryAgainError, match="Too many levels"):
        ShardSource("s", source.path, source.index_dir)


def test_damage_of_a_sidecar_is_not_taken_for_a_failure_that_passes(source):
    sidecar = sidecar_path(source.path / "a.tar", source.index_dir)
    whole = sidecar.read_bytes()
    for at in range(0, len(whole), 29):
        sidecar.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with suppress(UserError):
            read_index(sidecar)


def test_verify_says_how_to_index_what_is_there(source, cured, xc_data, capsys):
    change_shard(source)
    assert xc_data("verify", source.path, "--index-dir", source.index_dir) == 70
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "xc-data" in line)
    cured(UserError(line))
    assert merge(source.path, source.index_dir).samples == 40
