"""Fetching from a hub that flips, cuts, stalls and refuses: the right bytes or a sentence."""

import builtins
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import m2c, m2c_ok, start
from fake_hub import COMMIT, TOKEN, FakeHub, Repo, etag_of
from tiny_models import write_checkpoint
from vocabularies import llama_pieces, spm_model

from m2c import download
from m2c.errors import BadInput, Busy, M2CError, NoSpace, StorageError, UnsupportedModel
from m2c.hub import Absent, cache_folder, find_model, repo_folder
from m2c.model.aliases import ALIASES

NAME = "org/small"
LLAMA = ALIASES["llama2-70b"].repo
CHAT = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository like Llama 2's: tokenizer.model only, shards, and much that is not needed."""
    folder = write_checkpoint(tmp_path_factory.mktemp("origin") / "model")
    (folder / "tokenizer.json").unlink()
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files["tokenizer.model"] = spm_model(llama_pieces("▁ a e i n ▁t ▁a in he ▁the"))
    files["tokenizer_config.json"] = json.dumps({"chat_template": CHAT}).encode()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_x.py", "README.md"):
        files[name] = b"of no use"
    files["original/params.json"] = files["../../evil.json"] = b"{}"
    return files


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama_files: dict[str, bytes]
) -> Iterator[FakeHub]:
    for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(download, "PAUSES_S", (0, 0))
    made = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    made.repos[NAME] = Repo(dict(llama_files))
    yield made
    made.close()


def fetch(repo: str = NAME, revision: str = "main") -> Path:
    """Everything `m2c profile` does to get a model."""
    job = download.Download(repo, revision)
    files = job.weights(job.small())
    for file in job.survey(files):
        job.fetch(file)
    return job.finish()


def shard_of(hub: FakeHub) -> str:
    return min(name for name in hub.repos[NAME].files if name.startswith("model-"))


def parts() -> list[Path]:
    return sorted((repo_folder(NAME) / "blobs").glob("*.m2c-part"))


def assert_nothing_is_trusted() -> None:
    """No later run, of m2c or another program, finds a model or a file under a wrong hash."""
    assert isinstance(find_model(NAME), Absent)
    folder = repo_folder(NAME)
    assert not (folder / "refs").exists()
    assert not (folder / "snapshots").exists()
    for blob in (folder / "blobs").iterdir():
        name = "x.safetensors" if len(blob.name) == 64 else "x"
        assert blob.name.endswith(".m2c-part") or blob.name == etag_of(name, blob.read_bytes())


def test_only_what_is_needed_is_fetched_and_found_again(hub: FakeHub) -> None:
    path = fetch()
    files = hub.repos[NAME].files
    needed = {
        "config.json", "tokenizer.model", "tokenizer_config.json", "model.safetensors.index.json",
    } | {name for name in files if name.startswith("model-")}  # fmt: skip
    assert {file.name for file in path.iterdir()} == needed
    assert all((path / name).read_bytes() == files[name] for name in needed)
    found = find_model(NAME)
    assert not isinstance(found, Absent)
    assert found.path == path == repo_folder(NAME) / "snapshots" / COMMIT
    assert not parts()
    # as huggingface_hub lays it out
    from huggingface_hub import snapshot_download

    assert snapshot_download(NAME, local_files_only=True, cache_dir=os.environ["HF_HUB_CACHE"])
    assert find_model(f"{NAME}@{COMMIT}") == found


def test_a_tokenizer_json_makes_the_others_needless(hub: FakeHub) -> None:
    hub.repos[NAME].files["tokenizer.json"] = b"{}"
    assert set(download.Download(NAME, "main").small()) & {"tokenizer.json", "tokenizer.model"} == {
        "tokenizer.json"
    }


def test_a_vocabulary_and_its_merges_are_fetched_where_nothing_says_more(hub: FakeHub) -> None:
    files = hub.repos[NAME].files
    files |= {"vocab.json": b"{}", "merges.txt": b""}
    pair = {"vocab.json", "merges.txt"}
    assert not set(download.Download(NAME, "main").small()) & pair
    del files["tokenizer.model"]
    assert set(download.Download(NAME, "main").small()) >= pair


def test_a_pull_request_is_a_revision(hub: FakeHub) -> None:
    fetch(revision="refs/pr/7")
    assert not isinstance(find_model(f"{NAME}@refs/pr/7"), Absent)


def test_a_single_file_of_weights(hub: FakeHub) -> None:
    files = hub.repos[NAME].files
    hub.repos[NAME].files = {"config.json": files["config.json"], "model.safetensors": b"w" * 999}
    assert {file.name for file in fetch().iterdir()} == {"config.json", "model.safetensors"}


def test_a_token_goes_to_the_hub_and_not_to_the_store(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME].gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch()  # the store refuses requests with a token
    assert {server for server, _, _ in hub.seen} == {"hub", "store"}


@pytest.mark.parametrize(
    "fault", ["cut", "short", "no-range", "other-range", "stall", 500, 503, 429]
)
def test_what_passes_is_overcome(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, fault: str | int
) -> None:
    if fault == "stall":
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    name = shard_of(hub)
    hub.faults[name] = ["cut", fault]
    path = fetch()
    assert (path / name).read_bytes() == hub.repos[NAME].files[name]
    half = len(hub.repos[NAME].files[name]) // 2
    assert hub.asked(name)[:2] == ["", f"bytes={half}-"]


@pytest.mark.parametrize("file", ["shard", "config.json", "tokenizer.model"])
@pytest.mark.parametrize("fault", ["flip", "long"])
def test_wrong_bytes_are_deleted_and_named(hub: FakeHub, fault: str, file: str) -> None:
    name = shard_of(hub) if file == "shard" else file
    hub.faults[name] = [fault]
    with pytest.raises(BadInput, match="other bytes than the hub promises") as caught:
        fetch()
    assert name in caught.value.message
    assert "run the same command" in caught.value.hint
    assert_nothing_is_trusted()
    assert not parts() or all(not part.stat().st_size for part in parts())
    fetch()


def test_wrong_bytes_after_a_cut(hub: FakeHub) -> None:
    name = shard_of(hub)
    hub.faults[name] = ["flip", "cut"]
    part = repo_folder(NAME) / "blobs" / f"{etag_of(name, hub.repos[NAME].files[name])}.m2c-part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"what a crash left behind")
    hub.faults[name] = []
    with pytest.raises(BadInput, match="other bytes"):
        fetch()
    assert hub.asked(name) == ["bytes=24-"]
    assert_nothing_is_trusted()
    fetch()


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (["cut", 502, 502, 502], "answers 502"),
        (["cut", "stall", "stall", "stall", 500, 500, 500], "answers 500"),
        (["stall-at-once"] * 3, "nothing came for 1 s"),
    ],
)
def test_a_connection_that_stays_bad_keeps_what_came(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, faults: list[str | int], reason: str
) -> None:
    name = shard_of(hub)
    hub.faults[name] = list(faults)
    with monkeypatch.context() as patched:
        patched.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
        with pytest.raises(StorageError, match="broke off at") as caught:
            fetch()
    assert reason in caught.value.message
    assert "run the same command to go on" in caught.value.hint
    assert_nothing_is_trusted()
    size = parts()[0].stat().st_size
    assert (size > 0) == (faults[0] == "cut")
    hub.seen.clear()
    hub.faults.clear()
    job = download.Download(NAME, "main")
    files = job.weights(job.small())
    assert job.left_nbytes(files) == sum(file.nbytes for file in files) - size
    fetch()
    assert hub.asked(name) == [f"bytes={size}-" if size else ""]


def test_a_file_that_ends_early_for_good(hub: FakeHub) -> None:
    name = shard_of(hub)
    data = hub.repos[NAME].files[name]
    hub.repos[NAME].listing = {"siblings": hub._siblings(hub.repos[NAME])}
    hub.repos[NAME].files[name] = data[: len(data) // 2]
    with pytest.raises(StorageError, match="shorter than it says"):
        fetch()
    assert_nothing_is_trusted()


def refusal(hub: FakeHub, repo: str = NAME, revision: str = "main") -> M2CError:
    with pytest.raises(M2CError) as caught:
        fetch(repo, revision)
    return caught.value


def test_a_gated_repository_says_how_to_get_in(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME].gated = True
    error = refusal(hub)
    assert (error.exit_code, "is gated" in error.message) == (4, True)
    assert f"https://huggingface.co/{NAME}" in error.hint
    assert "export HF_TOKEN=hf_..." in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "with the account of your token" in refusal(hub).hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch()


def test_what_is_not_there(hub: FakeHub) -> None:
    error = refusal(hub, "org/nothing")
    assert (error.exit_code, error.message) == (
        4, f"org/nothing: no such repository on {hub.endpoint}",
    )  # fmt: skip
    assert "models?search=nothing" in error.hint
    hub.repos[NAME].private = True
    assert "or a private one" in refusal(hub).message
    hub.repos[NAME].private = False
    assert "no revision v9; leave @v9 out" in str(refusal(hub, NAME, "v9"))


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(401, 4, "does not accept your token"), (403, 4, "does not let you"), (500, 6, "answers 500"),
     (418, 4, "answers 418")],
)  # fmt: skip
def test_other_refusals(hub: FakeHub, status: int, code: int, words: str) -> None:
    hub.faults["config.json"] = [status] * 3
    error = refusal(hub)
    assert error.exit_code == code
    assert words in error.message
    assert "config.json" in error.message


def test_no_connection(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.close()
    error = refusal(hub)
    assert (error.exit_code, f"cannot reach {hub.endpoint}" in error.message) == (6, True)
    monkeypatch.setenv("HF_ENDPOINT", "not an address")
    assert refusal(hub).exit_code in (4, 6)


def test_a_hub_that_does_not_answer(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.3")
    hub.faults["api"] = ["stall"]
    assert "cannot reach" in refusal(hub).message


@pytest.mark.parametrize(
    "listing",
    [
        {"sha": "../../x"},
        {"sha": None},
        {"siblings": [{"rfilename": "config.json", "size": -1, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "config.json", "size": 1, "blobId": "../" * 13 + "x"}]},
        {"siblings": [{"rfilename": "config.json", "size": True, "blobId": "0" * 40}]},
        {"siblings": [{"rfilename": "config.json"}]},
        {"siblings": [{"size": 3}]},
        {"siblings": 7},
    ],
)
def test_nonsense_from_the_hub(hub: FakeHub, listing: dict[str, Any]) -> None:
    hub.repos[NAME].listing = listing
    error = refusal(hub)
    assert (error.exit_code, "nonsense" in error.message) == (4, True)


def test_repositories_without_weights_for_us(hub: FakeHub) -> None:
    repo = hub.repos[NAME]
    config = {"config.json": b"{}"}
    repo.files = config | {"pytorch_model.bin": b""}
    pickled = refusal(hub)
    assert isinstance(pickled, UnsupportedModel)
    assert f"{NAME}@refs/pr/" in pickled.hint
    repo.files = config | {"m.Q4_K.gguf": b""}
    assert f"hf download {NAME} m.Q4_K.gguf" in refusal(hub).hint
    repo.files = config
    assert "no model that m2c reads" in refusal(hub).message
    repo.files = config | {
        "model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'
    }
    assert "names b.safetensors, which is not there" in refusal(hub).message
    repo.files = config | {
        "model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'
    }
    assert "not the name of a file" in refusal(hub).message


def test_a_disk_without_room(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    job = download.Download(NAME, "main")
    files = job.weights(job.small())
    assert job.left_nbytes(files) == sum(file.nbytes for file in files)
    job.require_space(job.left_nbytes(files))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NoSpace, match="1000 B are free") as caught:
        job.require_space(1000)
    assert "HF_HUB_CACHE" in caught.value.hint


def test_a_disk_that_cannot_hold_the_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", no_links)
        error = refusal(hub)
    assert (error.exit_code, "disk with links: export HF_HUB_CACHE" in error.hint) == (6, True)
    assert not hub.asked("config.json")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert refusal(hub).exit_code == 4


def test_a_disk_that_fills_up(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    job = download.Download(NAME, "main")
    files = job.weights(job.small())
    monkeypatch.setattr("builtins.open", full_after(len(hub.repos[NAME].files[files[0].name]) // 2))
    with pytest.raises(NoSpace, match="no space left"):
        job.fetch(files[0])
    assert parts()[0].stat().st_size > 0


def full_after(nbytes: int) -> Any:
    """An `open` whose files take `nbytes` and then say that the disk is full."""
    original = builtins.open

    def opened(*arguments: Any, **options: Any) -> Any:
        file = original(*arguments, **options)
        if ".m2c-part" not in str(arguments[0]):
            return file

        class Full:
            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: bytes) -> int:
                file.write(data[:nbytes])
                raise OSError(errno.ENOSPC, "full")

        return Full()

    return opened


def test_two_at_once(hub: FakeHub) -> None:
    job = download.Download(NAME, "main")
    file = job.weights(job.small())[0]
    with open(job._part(file), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="another process"):
            job.fetch(file)


def test_what_another_program_stored_is_verified(hub: FakeHub) -> None:
    path = fetch()
    name = shard_of(hub)
    blob = (path / name).resolve()
    damaged = bytearray(blob.read_bytes())
    damaged[100] ^= 1
    blob.write_bytes(damaged)
    (path / "config.json").unlink()  # so that the snapshot is looked at again
    assert isinstance(find_model(NAME), Absent)
    hub.seen.clear()
    fetch()
    assert blob.read_bytes() == hub.repos[NAME].files[name]
    others = [other for other in hub.repos[NAME].files if other.startswith("model-")]
    assert [other for other in others if hub.asked(other)] == [name]


def test_a_snapshot_that_lacks_a_shard_is_not_taken_for_whole(hub: FakeHub) -> None:
    path = fetch()
    (path / shard_of(hub)).unlink()
    found = find_model(NAME)
    assert isinstance(found, Absent)
    assert shard_of(hub) in found.why


def test_profile_pack_run_of_a_gated_llama_2(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[LLAMA] = Repo(hub.repos[NAME].files, gated=True)
    said = m2c("profile", "llama2-70b", "--tokens", 64)
    assert said.code == 4
    assert "is gated" in said.err
    assert f"accept its terms at https://huggingface.co/{LLAMA}" in said.err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shards = [name for name in hub.repos[NAME].files if name.startswith("model-")]
    hub.faults[shards[0]] = ["cut"]
    hub.faults[shards[1]] = ["flip"]
    said = m2c("profile", "llama2-70b", "--tokens", 64)
    assert (said.code, "other bytes" in said.err) == (4, True)
    assert (m2c("profile", "llama2-70b", "--offline").code) == 4
    said = m2c("profile", "llama2-70b", "--tokens", 64)
    assert said.code == 0, said.err
    assert " free); stopped with Ctrl-C, the same command goes on" in said.err
    assert TOKEN not in said.err
    bundle = m2c_ok("pack", "llama2-70b", "--ssd", tmp_path).strip()
    assert Path(bundle).name == "llama2-70b.m2c"
    hub.close()  # from here on the model is on this machine
    text = m2c_ok("run", bundle, "--prompt", "the tea</s> in", "--max-tokens", 8, "--dram", "1GiB")
    assert text.strip()
    again = m2c_ok("profile", "llama2-70b", "--tokens", 64, "--offline")
    assert again == said.out


def test_a_model_that_m2c_does_not_run_is_refused_before_its_weights(hub: FakeHub) -> None:
    files = hub.repos[NAME].files
    config = json.loads(files["config.json"]) | {"model_type": "mamba"}
    files["config.json"] = json.dumps(config).encode()
    said = m2c("profile", NAME)
    assert said.code == 3
    assert f"{NAME}/config.json" in said.err
    assert not any(server == "store" for server, _, _ in hub.seen)


def fetched(hub: FakeHub) -> set[str]:
    """The files whose bytes were asked for."""
    return {path.split("/")[-1] for _, path, _ in hub.seen if not path.startswith("/api/")}


def test_plan_fetches_the_config_alone(hub: FakeHub) -> None:
    speed = ("--mode", "mixed", "--dram", "1GiB", "--dram-speed", "9GB")
    said = m2c("plan", NAME, *speed)
    assert said.code == 0, said.err
    assert said.out.startswith(f"{NAME}: 0.00 G weights, about ")
    assert said.reason == f"{NAME}: not in {cache_folder()}; asking the hub for its config.json"
    assert fetched(hub) == {"config.json"}
    hub.seen.clear()
    again = m2c("plan", NAME, *speed, "--offline")
    assert (again.out, again.err, hub.seen) == (said.out, "", [])
    # for every other command the model is still to be fetched
    assert isinstance(find_model(NAME), Absent)
    assert m2c("run", NAME).code == 4
    assert m2c("profile", NAME, "--tokens", 64).code == 0
    assert m2c("plan", NAME, *speed, "--offline").out == said.out


def test_plan_of_a_revision(hub: FakeHub) -> None:
    assert "no revision v9" in m2c("plan", f"{NAME}@v9").err
    assert json.loads(m2c_ok("plan", f"{NAME}@{COMMIT}", "--dram", "1GiB", "--json"))["mode"]
    assert m2c("plan", NAME, "--offline").code == 4  # that commit is not said to be main


def test_plan_of_what_a_stopped_download_left(hub: FakeHub) -> None:
    path = fetch()
    (path / shard_of(hub)).unlink()
    hub.seen.clear()
    m2c_ok("plan", NAME, "--dram", "1GiB")
    (path / "config.json").resolve().unlink()
    assert not hub.seen
    m2c_ok("plan", NAME, "--dram", "1GiB")
    assert fetched(hub) == {"config.json"}


def test_plan_when_the_config_cannot_be_had(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.repos[NAME]

    def reason(code: int) -> str:
        said = m2c("plan", NAME, "--dram", "1GiB")
        assert (said.code, said.out) == (code, "")
        return said.err.splitlines()[-1]

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "run it once without --offline, HF_HUB_OFFLINE unset" in reason(4)
    assert not hub.seen
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "huggingface_hub", None)
        assert 'pip install "m2cache[hub]"' in reason(4)
    repo.gated = True
    assert "is gated" in reason(4)
    repo.gated = False
    hub.faults["config.json"] = ["flip"]
    assert "other bytes than the hub promises" in reason(4)
    assert_nothing_is_trusted()
    repo.files["config.json"] = b"{" + b" " * (4 << 20) + b"}"
    assert "at most 4194304 do" in reason(4)
    repo.files["config.json"] = b'{"model_type": "mamba"}'
    assert "model_type 'mamba' is not supported" in reason(3)
    assert "no such repository" in m2c("plan", "org/nothing").err


def test_offline_says_what_to_do(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = m2c("profile", "llama2-70b", "--offline")
    assert (said.code, "without --offline" in said.reason) == (4, True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert m2c("profile", "llama2-70b").reason == said.reason
    assert not hub.seen


def test_without_huggingface_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = m2c("profile", "llama2-70b")
    assert said.code == 4
    assert 'pip install "m2cache[hub]"' in said.err


def test_stopped_by_the_user_it_goes_on_later(hub: FakeHub, tmp_path: Path) -> None:
    name = shard_of(hub)
    hub.faults[name] = ["stall"]
    process = start(
        "profile", NAME, "--tokens", 64, env=os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    )
    assert process.stderr is not None
    while "fetching" not in process.stderr.readline():
        assert process.poll() is None
    while not hub.asked(name):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in err
    assert_nothing_is_trusted()
    fetch()
