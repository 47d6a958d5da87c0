"""Models on a hub: what is asked of it, what is not, and every way in which it can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import FIXTURES, W4A16, altered
from command import cabochon as command
from command import fails
from hub import COMMIT, FakeHub, Fault, Repository, cut, damaged, fake_hub, shorter, status
from hub import without_ranges as all_of_it
from safetensors.torch import load_file, save_file

from cabochon.checkpoint.hub import Hub, HubError
from cabochon.checkpoint.source import HubId, hub_id
from cabochon.errors import LoadError, ResourceError, UnreadableError
from cabochon.load.obtain import inspect_model, obtain
from cabochon.load.report import inspect_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """W4A16, with what nobody should fetch beside it."""
    folder = Path(shutil.copytree(W4A16, tmp_path / "origin"))
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    return Repository(folder)


@pytest.fixture
def server(repository: Repository) -> Iterator[FakeHub]:
    with fake_hub(tiny=repository) as served:
        yield served


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(server.url, tmp_path / "cache", token=None)


@pytest.mark.parametrize(
    ("text", "id"),
    [
        ("google/gemma-4-E2B-it", HubId("google/gemma-4-E2B-it")),
        ("a/b@v2", HubId("a/b", "v2")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("a/b/c-Q4_0.gguf", HubId("a/b", None, "c-Q4_0.gguf")),
        ("a/b/sub/c.gguf@v2", HubId("a/b", "v2", "sub/c.gguf")),
        ("/a/b", None),
        ("./a/b", None),
        ("../a", None),
        ("~/a", None),
        ("a", None),
        ("a/b/c", None),
        ("models/x.gguf", None),
        ("a/b.safetensors", None),
        (str(W4A16), None),
    ],
)
def test_what_is_an_id(text: str, id: HubId | None) -> None:
    assert hub_id(text) == id


def test_a_path_that_is_there_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/name") is None
    assert hub_id("org/other") == HubId("org/other")


def test_inspecting_fetches_headers_and_no_weights(repository: Repository, hub: Hub) -> None:
    report = inspect_model("org/tiny", hub=hub)
    there = inspect_checkpoint(repository.folder)
    changed = {"source": f"org/tiny@{COMMIT[:12]}"}
    assert report.as_dict() == there.as_dict() | changed
    header = 8 + int.from_bytes((repository.folder / WEIGHTS).read_bytes()[:8], "little")
    assert 0 < header <= repository.sent[WEIGHTS] <= max(header, 1 << 17)
    asked = {name for _, name, _ in repository.requests}
    assert not asked & {"modeling.py", "optimizer.pt", "tokenizer.json"}
    assert {found.where for found in report.executables} == {"modeling.py", "optimizer.pt"}
    assert not hub.cache.exists()


def test_a_long_header_takes_two_requests(
    repository: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cabochon.checkpoint.hub.headers._FIRST", 1000)
    assert inspect_model("org/tiny", hub=hub).loads
    end = 8 + int.from_bytes((repository.folder / WEIGHTS).read_bytes()[:8], "little")
    assert repository.gets(WEIGHTS) == ["bytes=0-999", f"bytes=1000-{end - 1}"]


@pytest.mark.parametrize(
    "fault", [cut(0), cut(10), cut(5000), all_of_it, status(503), status(429, Retry_After="0")]
)
def test_headers_survive_what_passes(repository: Repository, hub: Hub, fault: Fault) -> None:
    repository.faults = {WEIGHTS: [fault], "config.json": [fault]}
    assert inspect_model("org/tiny", hub=hub).loads


def test_headers_that_are_always_cut_are_given_up(repository: Repository, hub: Hub) -> None:
    repository.faults = {WEIGHTS: [cut(0)] * 9}
    with pytest.raises(HubError, match=r"model\.safetensors was cut off after 0 bytes"):
        inspect_model("org/tiny", hub=hub)


def test_a_length_that_is_not_the_listed_one_is_refused(repository: Repository, hub: Hub) -> None:
    actual = (repository.folder / WEIGHTS).stat().st_size
    repository.sizes = {WEIGHTS: actual + 1}
    for use in (inspect_model, obtain):
        with pytest.raises(HubError, match=f"has {actual} bytes, .* says {actual + 1}"):
            use("org/tiny", hub=hub)


def test_a_file_that_is_no_safetensors_is_refused(repository: Repository, hub: Hub) -> None:
    (repository.folder / WEIGHTS).write_bytes(b"\xff" * 500)
    with pytest.raises(HubError, match="no safetensors"):
        inspect_model("org/tiny", hub=hub)
    (repository.folder / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b'{"a": 1}}')
    shown = f"org/tiny@{COMMIT[:12]}/{WEIGHTS}.header: the header"
    with pytest.raises(UnreadableError, match=shown):
        inspect_model("org/tiny", hub=hub)


def shards(folder: Path, tmp_path: Path) -> Path:
    """The same checkpoint in two files."""
    import json

    made = Path(shutil.copytree(folder, tmp_path / "shards"))
    tensors = load_file(made / WEIGHTS)
    (made / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, made / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    folder = shards(W4A16, tmp_path)
    with fake_hub(tiny=Repository(folder)) as server:
        hub = Hub(server.url, tmp_path / "cache")
        assert inspect_model("org/tiny", hub=hub).loads
        found = obtain("org/tiny", hub=hub).path
        assert inspect_checkpoint(found).hash == inspect_checkpoint(folder).hash
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(HubError, match="safetensors, which is not there"):
            inspect_model("org/tiny", hub=hub)


def test_what_is_downloaded_is_what_is_there(repository: Repository, hub: Hub) -> None:
    told: list[tuple[int, int]] = []
    source = obtain("org/tiny", lambda done, total: told.append((done, total)), hub=hub)
    assert (source.name, source.shown) == ("org/tiny", f"org/tiny@{COMMIT[:12]}")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", WEIGHTS):
        assert (source.path / name).read_bytes() == (repository.folder / name).read_bytes()
    assert not (source.path / "modeling.py").exists()
    assert not (source.path / "optimizer.pt").exists()
    size = (repository.folder / WEIGHTS).stat().st_size
    assert told[-1] == (size, size)
    assert told == sorted(told)
    requests = len(repository.gets(WEIGHTS))
    assert obtain("org/tiny", hub=hub) == source
    assert len(repository.gets(WEIGHTS)) == requests + 1  # its header, to judge it


def test_what_would_not_load_is_not_downloaded(
    repository: Repository, hub: Hub, tmp_path: Path
) -> None:
    def drop(tensors: dict[str, object]) -> None:
        del tensors["model.language_model.norm.weight"]

    altered(repository.folder, W4A16, tensors=drop)
    with pytest.raises(LoadError, match=r"model\.language_model\.norm"):
        obtain("org/tiny", hub=hub)
    assert repository.sent[WEIGHTS] <= 1 << 17
    assert not hub.cache.exists()


def size_of(repository: Repository) -> int:
    return (repository.folder / WEIGHTS).stat().st_size


@pytest.mark.parametrize("after", [0, 100_000, 200_000])
def test_a_download_that_is_cut_goes_on(repository: Repository, hub: Hub, after: int) -> None:
    repository.faults = {WEIGHTS: [lambda *_: False, cut(after)]}  # the first is the header's
    found = obtain("org/tiny", hub=hub).path
    assert (found / WEIGHTS).read_bytes() == (repository.folder / WEIGHTS).read_bytes()
    spans = repository.gets(WEIGHTS)[1:]
    assert len(spans) == 2
    start = int((spans[1] or "bytes=0-").removeprefix("bytes=").split("-")[0])
    assert start <= after


def begun(hub: Hub) -> Path:
    (path,) = hub.cache.rglob("*.begun")
    return path


def test_what_another_process_began_is_continued(
    repository: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(done: int, total: int) -> None:
        if done > total // 2:
            raise Ended

    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    with pytest.raises(Ended):
        obtain("org/tiny", end, hub=hub)
    half = begun(hub).stat().st_size
    assert 0 < half < size_of(repository)
    assert not list(hub.cache.rglob(f"snapshots/*/{WEIGHTS}"))
    found = obtain("org/tiny", hub=hub).path
    assert (found / WEIGHTS).read_bytes() == (repository.folder / WEIGHTS).read_bytes()
    assert repository.gets(WEIGHTS)[-1] == f"bytes={half}-"
    assert not list(hub.cache.rglob("*.begun"))


def test_a_server_without_ranges_sends_all_of_it_again(repository: Repository, hub: Hub) -> None:
    content = (repository.folder / WEIGHTS).read_bytes()
    source = obtain("org/tiny", hub=hub)
    blob = (source.path / WEIGHTS).resolve()
    (source.path / WEIGHTS).unlink()
    blob.rename(blob.with_name(f"{blob.name}.begun"))
    begun(hub).write_bytes(content[:1000])
    repository.faults = {WEIGHTS: [lambda *_: False, all_of_it]}
    assert (obtain("org/tiny", hub=hub).path / WEIGHTS).read_bytes() == content


def test_what_was_begun_and_is_damaged_is_found_and_removed(
    repository: Repository, hub: Hub
) -> None:
    source = obtain("org/tiny", hub=hub)
    blob = (source.path / WEIGHTS).resolve()
    (source.path / WEIGHTS).unlink()
    blob.rename(blob.with_name(f"{blob.name}.begun"))
    begun(hub).write_bytes(b"\0" * 1000)
    with pytest.raises(HubError, match=r"SHA-256 .* is removed"):
        obtain("org/tiny", hub=hub)
    assert not list(hub.cache.rglob("*.begun"))
    assert (obtain("org/tiny", hub=hub).path / WEIGHTS).is_file()


@pytest.mark.parametrize(("fault", "words"), [(damaged, "SHA-256"), (shorter, "size|bytes")])
def test_a_download_is_held_against_length_and_hash(
    repository: Repository, hub: Hub, fault: Fault, words: str
) -> None:
    repository.faults = {WEIGHTS: [lambda *_: False, fault]}
    with pytest.raises(HubError, match=words):
        obtain("org/tiny", hub=hub)
    assert not list(hub.cache.rglob(f"snapshots/*/{WEIGHTS}"))
    assert (obtain("org/tiny", hub=hub).path / WEIGHTS).is_file()


def test_a_download_waits_when_it_is_told_to(repository: Repository, hub: Hub) -> None:
    repository.faults = {WEIGHTS: [lambda *_: False, status(429, Retry_After="0")]}
    assert (obtain("org/tiny", hub=hub).path / WEIGHTS).is_file()


def test_a_disk_too_small_is_told_before(
    repository: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("cabochon.checkpoint.hub.downloads.disk_usage", lambda _: few)
    with pytest.raises(ResourceError, match="HF_HOME"):
        obtain("org/tiny", hub=hub)
    assert not list(hub.cache.rglob("*.begun"))


def private(repository: Repository) -> None:
    repository.token = "hf_secret"


def gated(repository: Repository) -> None:
    repository.gated = True


def busy(repository: Repository) -> None:
    repository.listing_status = 429


def broken(repository: Repository) -> None:
    repository.listing_status = 500


@pytest.mark.parametrize(
    ("change", "model", "words"),
    [
        (private, "org/tiny", ("401", "HF_TOKEN", "hf auth login")),
        (gated, "org/tiny", ("403", "accept the conditions", "/org/tiny")),
        (busy, "org/tiny", ("429", "after 7 seconds")),
        (broken, "org/tiny", ("500",)),
        (lambda _: None, "org/other", ("401", "no such repository")),
        (lambda _: None, "org/tiny@gone", ("404", "no revision 'gone'")),
        (lambda _: None, "org/tiny/model.gguf", ("no file model.gguf", "config.json")),
    ],
)
def test_refusals_say_what_to_do(
    repository: Repository,
    hub: Hub,
    change: Callable[[Repository], None],
    model: str,
    words: tuple[str, ...],
) -> None:
    change(repository)
    for use in (inspect_model, obtain):
        with pytest.raises(HubError) as error:
            use(model, hub=hub)
        for word in words:
            assert word in str(error.value)
        assert error.value.exit_code == 2


def test_a_token_opens_what_is_private(
    repository: Repository, server: FakeHub, tmp_path: Path
) -> None:
    repository.token = "hf_secret"
    hub = Hub(server.url, tmp_path / "cache", token="hf_secret")
    assert inspect_model("org/tiny@v2", hub=hub).loads
    assert (obtain("org/tiny@v2", hub=hub).path / WEIGHTS).is_file()
    with pytest.raises(HubError, match="401"):
        inspect_model("org/tiny", hub=Hub(server.url, tmp_path / "cache", token="hf_wrong"))


def test_large_files_may_lie_on_another_host_which_gets_no_token(
    repository: Repository, server: FakeHub, tmp_path: Path
) -> None:
    repository.token, repository.elsewhere = "hf_secret", True
    repository.faults = {WEIGHTS: [cut(100), lambda *_: False, cut(200_000)]}
    hub = Hub(server.url, tmp_path / "cache", token="hf_secret")
    found = obtain("org/tiny", hub=hub).path
    assert (found / WEIGHTS).read_bytes() == (repository.folder / WEIGHTS).read_bytes()
    assert repository.sent[WEIGHTS]
    assert not repository.leaked


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="cannot be reached"):
        inspect_model("org/tiny", hub=Hub("http://127.0.0.1:9", tmp_path))


def test_a_repository_without_weights(tmp_path: Path) -> None:
    folder = tmp_path / "origin"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with (
        fake_hub(tiny=Repository(folder)) as server,
        pytest.raises(HubError, match=r"it has pytorch_model\.bin"),
    ):
        inspect_model("org/tiny", hub=Hub(server.url, tmp_path / "cache"))


def test_the_command_goes_through_the_environment(
    repository: Repository, server: FakeHub, tmp_path: Path
) -> None:
    repository.token = "hf_secret"
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    fails(command("inspect", "org/tiny", **environment), 2, "HF_TOKEN")
    environment["HF_TOKEN"] = "hf_secret"
    result = command("inspect", "org/tiny", **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"org/tiny@{COMMIT[:12]}: loads")
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    fails(command("inspect", "org/tiny", **offline), 2, "HF_HUB_OFFLINE")
    arguments = ("org/tiny", "-p", "Hello", "--max-tokens", "2", "--temperature", "0")
    answer = command("run", *arguments, **environment)
    assert answer.returncode == 0, answer.stderr
    asked = len(repository.requests)
    again = command("run", *arguments, **offline)
    assert again.returncode == 0, again.stderr
    assert again.stdout == answer.stdout
    assert command("inspect", "org/tiny", **offline).stdout.startswith("org/tiny: loads")
    assert len(repository.requests) == asked


def short(repository: Repository) -> None:
    repository.sizes[WEIGHTS] = 1_000


def cut_always(repository: Repository) -> None:
    repository.faults = {WEIGHTS: [cut(4)] * 20}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (private, "HF_TOKEN"),
        (gated, "accept the conditions"),
        (busy, "after 7 seconds"),
        (broken, "500"),
        (short, WEIGHTS),
        (cut_always, WEIGHTS),
    ],
)
def test_the_command_says_what_went_wrong(
    repository: Repository,
    server: FakeHub,
    tmp_path: Path,
    change: Callable[[Repository], None],
    words: str,
) -> None:
    change(repository)
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    fails(command("inspect", "org/tiny", **environment), 2, words)


@pytest.mark.parametrize("flag", ["--json", "--tensors", "--card", "--weights-only"])
def test_every_form_of_the_report_costs_headers_alone(
    repository: Repository, server: FakeHub, tmp_path: Path, flag: str
) -> None:
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    result = command("inspect", "org/tiny@v2", flag, **environment)
    assert result.returncode == 0, result.stderr
    assert "int4 g32" in result.stdout
    assert repository.sent[WEIGHTS] < 200_000 < (repository.folder / WEIGHTS).stat().st_size


GGUF = FIXTURES / "gguf"


@pytest.fixture
def ggufs(tmp_path: Path) -> Iterator[tuple[Repository, Hub]]:
    """Models of several sizes, a folder each, as their converters left them."""
    repository = Repository(GGUF)
    with fake_hub(gguf=repository, one=Repository(GGUF / "e2b")) as server:
        yield repository, Hub(server.url, tmp_path / "cache")


@pytest.mark.parametrize("file", ["e2b/e2b-q4_1.gguf", "12b/12b-q8_0-00001-of-00003.gguf"])
def test_headers_of_gguf_are_fetched_with_those_of_parts_and_projector(
    ggufs: tuple[Repository, Hub], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    repository, hub = ggufs
    monkeypatch.setattr("cabochon.checkpoint.hub.headers._FIRST_GGUF", 1000)
    report = inspect_model(f"org/gguf/{file}", hub=hub)
    there = inspect_checkpoint(GGUF / file)
    assert report.hash == there.hash
    assert report.identity == there.identity
    asked = {name for _, name, _ in repository.requests}
    assert any("mmproj" in name for name in asked)
    assert sum(repository.sent.values()) < there.nbytes


def test_a_gguf_model_is_downloaded_whole(ggufs: tuple[Repository, Hub]) -> None:
    _, hub = ggufs
    file = "12b/12b-q8_0-00001-of-00003.gguf"
    found = obtain(f"org/gguf/{file}", hub=hub).path
    there = GGUF / "12b"
    assert sorted(p.name for p in found.parent.iterdir()) == sorted(
        p.name for p in there.iterdir() if p.suffix == ".gguf"
    )
    assert inspect_checkpoint(found).hash == inspect_checkpoint(GGUF / file).hash


def test_the_one_model_of_a_repository_is_found(ggufs: tuple[Repository, Hub]) -> None:
    _, hub = ggufs
    there = inspect_checkpoint(GGUF / "e2b")
    assert inspect_model("org/one", hub=hub).hash == there.hash
    source = obtain("org/one", hub=hub)
    assert inspect_checkpoint(source.path).hash == there.hash
    hub.offline = True
    assert obtain("org/one", hub=hub).path == source.path
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        obtain("org/gguf", hub=hub)


def test_of_several_models_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf", "mmproj-bf16.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with fake_hub(many=Repository(tmp_path)) as server:
        hub = Hub(server.url, tmp_path / "cache")
        with pytest.raises(HubError, match=r"org/many/FILE.* a-Q4_0\.gguf, a-Q8_0\.gguf$"):
            inspect_model("org/many", hub=hub)
        with pytest.raises(UnreadableError, match=r"a-Q4_0\.gguf"):
            inspect_model("org/many/a-Q4_0.gguf", hub=hub)
