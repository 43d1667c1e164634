"""The guards that scripts/mutate.py takes away, one at a time, and the tests that must notice.

A guard is a piece of src/m2c and what it is replaced by. `old` must occur once in its file:
tests/test_guards.py says so when code has moved. Knows nothing about how tests are run.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Guard:
    """tests: pytest's words, the nearest tests; if they stay green, the whole suite is asked."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def _never(name: str, file: str, condition: str, tests: str) -> Guard:
    """A check whose condition is never true."""
    return Guard(name, file, f"if {condition}:", f"if False and ({condition}):", tests)


WRITES: Final = (
    Guard(
        "fsync of a file before its rename", "bundle/files.py",
        "                os.fsync(file.fileno())\n", "",
        "tests/test_power_cut.py tests/test_pack.py",
    ),
    Guard(
        "fsync of the folder after a rename", "bundle/files.py",
        "        sync_directory(path.parent)\n    except", "        pass\n    except",
        "tests/test_power_cut.py",
    ),
    Guard(
        "files appear by rename", "bundle/files.py",
        "    temporary = temporary_name(path)\n    with",
        "    temporary = path\n    with", "tests/test_pack_killed.py",
    ),
    Guard(
        "a failed write leaves no temporary file", "bundle/files.py",
        "            temporary.unlink(missing_ok=True)\n            raise", "            raise",
        "tests/test_pack.py tests/test_cli_errors.py tests/test_pack_faults.py",
    ),
    Guard(
        "a signal leaves no temporary file", "bundle/files.py",
        "        except BaseException:\n            temporary",
        "        except Exception:\n            temporary",
        "tests/test_pack_faults.py",
    ),
    Guard(
        "bytes reach the file before its fsync", "bundle/files.py",
        "                file.flush()\n", "", "tests/test_power_cut.py",
    ),
    Guard(
        "a name whose sync failed is taken back", "bundle/files.py",
        "        path.unlink(missing_ok=True)\n        raise", "        raise",
        "tests/test_pack_faults.py",
    ),
    _never("a file system without syncs of folders", "bundle/files.py",
           "error.errno != errno.EINVAL", "tests/test_pack_faults.py"),
    Guard(
        "temporary names do not repeat", "bundle/files.py",
        "-{os.urandom(4).hex()}", "-00000000", "tests/test_pack_faults.py",
    ),
    Guard(
        "a quota is a full disk", "bundle/files.py", "errno.EDQUOT, ", "", "tests/test_pack.py",
    ),
    Guard(
        "a limit on files is a full disk", "bundle/files.py", ", errno.EFBIG", "",
        "tests/test_pack_faults.py",
    ),
    _never(
        "devices and links are not replaced", "bundle/files.py",
        "path.is_symlink() or (path.exists() and not path.is_file())", "tests/test_files.py",
    ),
    _never("a full disk is told from a broken one", "bundle/files.py", "error.errno in _FULL",
           "tests/test_pack.py tests/test_cli_errors.py"),
    Guard(
        "links are not followed", "bundle/files.py",
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC", "os.O_RDONLY | os.O_CLOEXEC",
        "tests/test_manifest.py tests/test_bundle_contents.py",
    ),
    _never("small files are small", "bundle/files.py", "len(data) > limit",
           "tests/test_files.py"),
    Guard(
        "one pack at a time", "bundle/claim.py",
        "        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "        pass",
        "tests/test_pack.py",
    ),
    Guard(
        "the bundle's own name is synced", "bundle/claim.py",
        "        sync_directory(path.parent)\n", "", "tests/test_power_cut.py",
    ),
    Guard(
        "names in the bundle are synced by a pack that goes on", "bundle/claim.py",
        "    with disk_errors(path):\n        sync_directory(path)\n        for",
        "    with disk_errors(path):\n        for", "tests/test_power_cut.py",
    ),
    Guard(
        "names in its folders are, too", "bundle/claim.py",
        "            sync_directory(path / folder)\n", "", "tests/test_power_cut.py",
    ),
    Guard(
        "an unfinished bundle is marked", "bundle/claim.py",
        "        if not (path / MANIFEST).exists() and not (path / MARKER).exists():\n"
        '            write_atomic(path / MARKER, recipe.encode() + b"\\n")\n', "",
        "tests/test_pack_killed.py",
    ),
    Guard(
        "the recipe is looked at again under the lock", "bundle/claim.py",
        "        else:\n            _refuse_foreign(path, recipe)\n", "", "tests/test_at_once.py",
    ),
    _never("a bundle of another recipe is not overwritten", "bundle/claim.py", "packed != recipe",
           "tests/test_pack.py"),
    Guard(
        "a folder of somebody else is refused", "bundle/claim.py",
        '        raise UsageError(\n            f"{path} is not empty and holds',
        '        return\n        raise UsageError(\n            f"{path} is not empty and holds',
        "tests/test_pack.py",
    ),
    Guard(
        "what a killed pack left is removed", "bundle/claim.py",
        "        _remove_temporaries(path)\n", "", "tests/test_pack_killed.py tests/test_pack.py",
    ),
    _never("a finished shard is of this recipe", "pipeline.py", "index.header.recipe != recipe",
           "tests/test_pack.py tests/test_pack_killed.py"),
    Guard(
        "a finished shard is intact", "pipeline.py",
        "        for _ in verify_blocks(index):\n            pass\n", "",
        "tests/test_pack_killed.py",
    ),
    Guard(
        "a finished shard that cannot be read is written again", "pipeline.py",
        "except (BadInput, StorageError)", "except BadInput", "tests/test_pack_faults.py",
    ),
    Guard(
        "a full disk says how much is missing", "pack.py", "with _sizes_said(job, path), ", "with ",
        "tests/test_pack_faults.py",
    ),
    Guard(
        "the profile belongs to the checkpoint", "pack.py", "    require_matching(job)\n", "",
        "tests/test_pack.py tests/test_cli_errors.py",
    ),
    Guard(
        "the bundle does not lie in the checkpoint", "pack.py",
        "    _refuse_input_as_output(job.checkpoint.path, path)\n", "", "tests/test_pack.py",
    ),
    _never("a bundle that will not fit is not begun", "pack.py", "needed > free",
           "tests/test_pack.py tests/test_cli_errors.py"),
    _never("weights are finite", "model/weights.py", "not bool(torch.isfinite(tensor).all())",
           "tests/test_pack.py tests/test_encode.py"),
)  # fmt: skip

BUNDLES: Final = (
    Guard(
        "the manifest's checksum", "bundle/manifest.py",
        "sound = checksum == hashlib.sha256(dump_json(facts)).hexdigest()", "sound = True",
        "tests/test_manifest.py tests/test_every_bit.py",
    ),
    Guard(
        "the manifest is canonical", "bundle/manifest.py",
        ' or data != dump_json({**facts, "checksum": checksum}) + b"\\n"', "",
        "tests/test_manifest.py",
    ),
    _never("the bundle's version", "bundle/manifest.py", 'facts.get("version") != VERSION',
           "tests/test_manifest.py"),
    Guard(
        "names stay in the bundle", "bundle/manifest.py",
        "        _check_name(name, path)\n", "        pass\n", "tests/test_manifest.py",
    ),
    _never("a mix adds up", "bundle/manifest.py",
           "len(manifest.mix.percent) != 3 or sum(manifest.mix.percent) != 100",
           "tests/test_manifest.py"),
    _never("the shard is the one that the manifest names", "bundle/bundle.py",
           "index.digest != fact.digest", "tests/test_bundle_contents.py tests/test_shard_lies.py"),
    _never("digests of side files", "bundle/bundle.py",
           "hashlib.sha256(data).hexdigest() != fact.sha256", "tests/test_bundle_contents.py"),
    _never("a block's checksum", "bundle/shard.py",
           "xxhash.xxh3_64_intdigest(data) != self.block_hashes[block]", "tests/test_shard.py"),
    _never("a header's checksum", "bundle/shard.py",
           "_HASH.unpack(page[-8:])[0] != xxhash.xxh3_64_intdigest(page[:-8])",
           "tests/test_shard.py"),
    Guard(
        "an index's checksum", "bundle/shard.py",
        "if len(index) != expected or _HASH.unpack(index[-8:])[0] != xxhash.xxh3_64_intdigest(\n"
        "        index[:-8]\n    ):",
        "if len(index) != expected:", "tests/test_shard.py",
    ),
    _never("a shard's length", "bundle/shard.py", "nbytes != expected", "tests/test_shard.py"),
    _never("frame sizes add up", "bundle/shard.py",
           "int(nbytes.sum(dtype=np.uint64)) != section.nbytes", "tests/test_shard_lies.py"),
    _never("no frame is impossible", "bundle/shard.py",
           "((escapes > weights) | (listed > nbytes) | (nbytes - listed > 2 * weights)).any()",
           "tests/test_shard_lies.py"),
    _never("sections tile the payload", "bundle/shard.py",
           "not small or s.frame_records > s.records or s.offset != position",
           "tests/test_shard_lies.py tests/test_shard.py"),
    _never("sections fill the payload", "bundle/shard.py",
           "position != header.payload_nbytes or position >= 1 << 48",
           "tests/test_shard_lies.py tests/test_shard.py"),
    _never("duplicate keys", "bundle/strict.py", "len(found) != len(pairs)",
           "tests/test_manifest.py tests/test_safetensors_file.py"),
    _never("unknown keys", "bundle/strict.py", "unknown", "tests/test_manifest.py"),
    _never("true is not a number", "bundle/strict.py", "type(value) is not kind",
           "tests/test_manifest.py"),
    _never("numbers are in range", "bundle/strict.py", "kind is int and not 0 <= value < 1 << 62",
           "tests/test_manifest.py tests/test_shard_lies.py"),
    Guard(
        "damaged frames stop a run", "kernels/csrc/frames.c",
        "            atomic_store_explicit(&c->k->damaged, 1, memory_order_relaxed);",
        "            ;",
        "tests/test_exact.py tests/test_frames.py tests/test_shard_lies.py",
    ),
)  # fmt: skip

RUNS: Final = (
    Guard(
        "SIGTERM is tidied up after", "cli/app.py",
        "    signal.signal(signal.SIGTERM, _unwind)\n", "", "tests/test_signals.py",
    ),
    _never("a reader that leaves is no error", "cli/app.py",
           "isinstance(error, BrokenPipeError)", "tests/test_signals.py"),
    Guard(
        "blocks are verified on arrival", "tiers/ssd.py",
        "                index.verify(request.block + i // BLOCK, view[i : i + BLOCK])",
        "                pass", "tests/test_store_failures.py tests/test_shard.py",
    ),
    Guard(
        "a read that ends early", "tiers/ssd.py",
        "        if whole == done:\n",  # without it the loop would never end
        "        if whole == done:\n            return\n        if False:\n",
        "tests/test_store_failures.py tests/test_disk_fails.py",
    ),
    Guard(
        "a short direct read goes on at a page", "tiers/ssd.py",
        "reached // PAGE * PAGE if request.direct and reached < len(view) else reached", "reached",
        "tests/test_disk_fails.py",
    ),
    Guard(
        "a short read of an index is read on", "bundle/files.py",
        "        data += part\n", "        data += part\n        break\n",
        "tests/test_disk_fails.py",
    ),
    Guard(
        "a failed read names the byte", "tiers/ssd.py",
        'with disk_errors(f"{request.index.path} at byte {begin + done}"):',
        "with disk_errors(request.index.path):", "tests/test_disk_fails.py",
    ),
    Guard(
        "a disk that does not answer cannot hold a process", "cli/app.py",
        '    exit_in_time(code, "interrupted" if number == signal.SIGINT else "terminated")\n', "",
        "tests/test_disk_fails.py",
    ),
    _never("norms are finite", "contents.py", "not np.isfinite(array).all()",
           "tests/test_model.py"),
    Guard(
        "NaN is above all products (AVX-512)", "kernels/csrc/columns512.inc.c",
        "top = _mm512_max_epu32(top, _mm512_castps_si512(_mm512_abs_ps(products[n])));",
        "top = _mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(top), "
        "_mm512_abs_ps(products[n])));", "tests/test_native.py",
    ),
    Guard(
        "NaN is above all products (AVX2)", "kernels/csrc/columns2.inc.c",
        "top = _mm256_max_epu32(top, magnitude);",
        "top = _mm256_castps_si256(_mm256_max_ps(_mm256_castsi256_ps(top), "
        "_mm256_castsi256_ps(magnitude)));", "tests/test_native.py",
    ),
    Guard(
        "NaN passes a ReLU", "kernels/csrc/ffn.c", "gate <= act.threshold ? 0 : gate",
        "gate > act.threshold ? gate : 0", "tests/test_native.py",
    ),
    Guard(
        "a soft cap hides no infinite score", "kernels/csrc/attention.c",
        " * cap + (scores[p] - scores[p])", " * cap", "tests/test_native.py",
    ),
    Guard(
        "reads have ended before their buffer is used again", "tiers/ssd.py",
        "            self.cancel()  # whoever gets this may reuse the buffer at once\n", "",
        "tests/test_store_failures.py",
    ),
    Guard(
        "a pass that was broken off starts anew", "tiers/ring.py",
        "            self._rewind()\n        assert", "            pass\n        assert",
        "tests/test_store_failures.py tests/test_store.py",
    ),
    Guard(
        "a failed read empties the cache", "tiers/upgrades.py",
        "            self.cache.clear()  # a slot may not hold what the cache says it does\n", "",
        "tests/test_upgrades.py tests/test_store_failures.py",
    ),
    Guard(
        "what a caller needs beside the model is planned for", "engine.py",
        "found.workspace_nbytes + options.aside", "found.workspace_nbytes",
        "tests/test_evaluate.py",
    ),
    Guard(
        "evaluation refuses before its first pass", "cli/eval.py",
        "    _require_room(opened, [full, *asked])\n", "", "tests/test_smallest.py",
    ),
    Guard(
        "a plan stays within its budget", "tiers/placement.py",
        "        if tier.fixed + nbytes <= tier.capacity:", "        if True:",
        "tests/test_plan_command.py tests/test_store.py tests/test_plan.py",
    ),
    Guard(
        "the context has an end", "model/kv.py",
        "if self.length + tokens > self.ctx_size:", "if False:",
        "tests/test_generate.py tests/test_model.py",
    ),
    _never("logits are finite", "model/transformer.py",
           "not all(math.isfinite(end) for end in logits.aminmax())",
           "tests/test_model.py"),
    Guard(
        "drafts leave the KV cache before they are verified", "speculate.py",
        "            self._model.kv.truncate(start)\n", "", "tests/test_speculate.py",
    ),
    Guard(
        "rejected drafts leave the KV cache", "speculate.py",
        "            self._model.kv.truncate(verified_length)", "            pass",
        "tests/test_speculate.py",
    ),
    Guard(
        "a draft counts only if the exact model says the same", "speculate.py",
        "or found[-1] != drafts[len(found) - 1]:", "or False:", "tests/test_speculate.py",
    ),
    Guard(
        "a cut answer leaves only what is certain", "conversation.py",
        "        self._kv.truncate(max(0, len(ids) - 1))\n", "", "tests/test_conversation.py",
    ),
    Guard(
        "a new prompt drops what differs", "conversation.py",
        "        self._kv.truncate(same)\n", "", "tests/test_conversation.py",
    ),
    Guard(
        "what a user types is no special token", "tokenizer.py",
        "        self._engine.encode_special_tokens = not special",
        "        self._engine.encode_special_tokens = False", "tests/test_tokenizer.py",
    ),
    Guard(
        "an expert that was not read is not kept", "tiers/expert_memory.py",
        "        one.pending.wait()\n        one.pending = None\n        if to_hbm",
        "        one.pending, waited = None, one.pending\n"
        "        self.dram.take(one.part, one.place, keep)\n        waited.wait()\n"
        "        if to_hbm",
        "tests/test_experts.py",
    ),
    Guard(
        "an expert under way keeps its slot", "tiers/expert_slots.py", "keep=sorted(keep)",
        "keep=[]", "tests/test_expert_tiers.py",
    ),
    Guard(
        "a slot's operands go with its expert", "tiers/expert_memory.py",
        "        self._fills[False][place] += 1\n", "", "tests/test_experts.py",
    ),
    Guard(
        "operands in HBM go with their expert", "tiers/expert_memory.py",
        "        self._fills[True][place] += 1\n", "", "tests/test_expert_tiers.py",
    ),
    Guard(
        "operands of an expert's planes go with any of them", "tiers/experts.py",
        "made.places == places and made.fills == fills", "made.fills[0] == fills[0]",
        "tests/test_expert_mixes.py",
    ),
    Guard(
        "experts that fill memory at first may be driven out", "tiers/expert_slots.py",
        "                cache.unpin(first)\n", "                pass\n",
        "tests/test_expert_mixes.py",
    ),
    Guard(
        "an expert that is used stays", "tiers/expert_slots.py",
        "cache.touch(np.sort([own[kind] for own in wanted if len(own) > kind]))", "pass",
        "tests/test_expert_mixes.py",
    ),
    Guard(
        "what is read does not overwrite what is being copied to HBM", "tiers/expert_memory.py",
        "        finished(self._leaving[place])", "        finished(None)",
        "tests/test_expert_tiers.py",
    ),
    Guard(
        "kernels wait for an expert that is copied to HBM", "tiers/expert_memory.py",
        "            self.link.await_copy(copied)\n", "",
        "tests/test_expert_tiers.py",
    ),
    Guard(
        "an expert in HBM is overwritten when its kernels have ended", "tiers/link.py",
        "after=asked)", "after=None)", "tests/test_expert_tiers.py",
    ),
    Guard(
        "what HBM drives out goes to DRAM", "tiers/expert_memory.py",
        "        if self.dram.at(gone) == ABSENT:", "        if False:",
        "tests/test_expert_tiers.py",
    ),
    Guard(
        "tokens of a prompt have an expert each at its own precision", "model/experts.py",
        "rows.lowest(level)", "rows", "tests/test_expert_mixes.py",
    ),
    Guard(
        "a profile that mixes experts is refused", "pack.py",
        "        and all(keeps_experts(layer.order, config) for layer in known.layers)\n", "",
        "tests/test_experts.py",
    ),
)  # fmt: skip

SOURCES: Final = (
    _never("no hole, no overlap in safetensors", "model/safetensors_file.py",
           "entry.offset != end", "tests/test_safetensors_file.py"),
    _never("safetensors fill their file", "model/safetensors_file.py", "end != file.size",
           "tests/test_safetensors_file.py"),
    _never("a tensor's bytes are its shape", "model/safetensors_file.py",
           "prod(shape) * _BITS[dtype] != nbytes * 8", "tests/test_safetensors_file.py"),
    _never("a safetensors header fits its file", "model/safetensors_file.py",
           "not 2 <= length <= min(_MAX_HEADER, file.size - 8)", "tests/test_safetensors_file.py"),
    _never("GGUF counts fit their file", "model/gguf_header.py",
           "tensor_count * 32 + pair_count * 13 > min(file.size, _MAX_HEADER)",
           "tests/test_gguf_header.py"),
    _never("GGUF arrays are bounded", "model/gguf_header.py", "self.items > _MAX_ITEMS",
           "tests/test_gguf_header.py"),
    _never("GGUF tensors do not overlap", "model/gguf_header.py", "info.offset < end",
           "tests/test_gguf_header.py"),
    _never("GGUF tensors lie in the file", "model/gguf_header.py", "end > file.size",
           "tests/test_gguf_header.py"),
    _never("a GGUF key occurs once", "model/gguf_header.py", "key in metadata",
           "tests/test_gguf_header.py"),
    _never("a checkpoint is a regular file", "model/ranged_file.py",
           "not stat.S_ISREG(status.st_mode)", "tests/test_safetensors_file.py"),
    _never("a file that was cut is an error", "model/ranged_file.py", "not count",
           "tests/test_safetensors_file.py tests/test_gguf_file.py"),
    _never("no link leads out of a checkpoint", "model/hf_folder.py",
           "not any(target.is_relative_to(folder) for folder in allowed)",
           "tests/test_checkpoint.py"),
    _never("an index names files of its folder", "model/hf_folder.py",
           'not plain or "\\\\" in shard',
           "tests/test_checkpoint.py"),
    Guard(
        "templates run in a sandbox", "chat.py",
        "    environment = ImmutableSandboxedEnvironment(\n",
        "    from jinja2 import Environment\n\n    environment = Environment(\n",
        "tests/test_chat.py",
    ),
    Guard(
        "templates have limited time", "chat.py",
        '    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"],) * 2)\n', "",
        "tests/test_chat.py",
    ),
    Guard(
        "templates have limited memory", "chat.py",
        "    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_NBYTES,) * 2)\n", "",
        "tests/test_chat.py",
    ),
    _never("templates have limited output", "chat.py", "nchars > MAX_PROMPT_CHARS",
           "tests/test_chat.py"),
    _never("a fetched file has the hub's hash", "download.py", "digest.hexdigest() != file.etag",
           "tests/test_download.py"),
    _never("a fetched file is not longer than promised", "download.py", "have > file.nbytes",
           "tests/test_download.py"),
    Guard(
        "what another program left is hashed", "download.py",
        "        return bool(digest.hexdigest() == file.etag)", "        return True",
        "tests/test_download.py",
    ),
)  # fmt: skip

REPAIRS: Final = (
    _never(
        "what is made again is the manifest's",
        "repair.py",
        "sha256 != fact.sha256",
        "tests/test_repair.py",
    ),
    _never(
        "a bundle of other weights is not mended",
        "repair.py",
        "manifest.source.fingerprint != job.checkpoint.fingerprint()",
        "tests/test_repair.py",
    ),
    Guard(
        "a bundle of another profile is not mended",
        "repair.py",
        "        _require_same_recipe(job, path, sorted(set(manifest.shards) - damaged))\n",
        "",
        "tests/test_repair.py",
    ),
    Guard(
        "a folder without a manifest is ours",
        "repair.py",
        "        _require_ours(job, path)\n",
        "",
        "tests/test_repair.py",
    ),
    Guard(
        "only what is damaged is put in place",
        "repair.py",
        "names = damaged & set(group.files.values())",
        "names = set(group.files.values()) if damaged & set(group.files.values()) else set()",
        "tests/test_repair.py",
    ),
    Guard(
        "a repair leaves no temporary file",
        "repair.py",
        "file.unlink(missing_ok=True)",
        "pass",
        "tests/test_repair.py",
    ),
    Guard(
        "a folder is held before its manifest goes",
        "bundle/claim.py",
        "        _lock(descriptor, path)\n",
        "        if not reclaim:\n            _lock(descriptor, path)\n",
        "tests/test_repair.py",
    ),
    Guard(
        "a marker before the manifest goes",
        "bundle/claim.py",
        """    write_atomic(path / MARKER, recipe.encode() + b"\\n")
    with disk_errors(path / MANIFEST):""",
        "    with disk_errors(path / MANIFEST):",
        "tests/test_repair.py",
    ),
    Guard(
        "check goes on after a damaged block",
        "bundle/bundle.py",
        "                yield error\n",
        "                yield error\n                return\n",
        "tests/test_repair.py",
    ),
    _never(
        "check compares sha256",
        "check.py",
        'hashlib.file_digest(data, "sha256").hexdigest() != fact.sha256',
        "tests/test_repair.py",
    ),
)

GUARDS: Final = (*WRITES, *BUNDLES, *REPAIRS, *RUNS, *SOURCES)
