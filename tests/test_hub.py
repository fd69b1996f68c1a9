# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Release of a checkpoint, upload to the Hub and download: the real clients, in separate processes, against a local
server. `test_push.py` tests what is refused before the upload.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from diffvp import cli
from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.hub import release as release_module
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.storage_diffvp import digest

from .hub_samples import document, make_pushable, run_client, run_command, write_scan
from .hub_server import LOST, Hub

BASE = "tester/tiny-llama"  # base LLM of the tiny checkpoint


@pytest.mark.slow
def test_release_has_only_safe_files_and_loads_alone(
    tiny_base_with_tokenizer, tiny_fields, tokenizer, repository_root, tmp_path, monkeypatch
):
    size = dict(zip(("depth", "height", "width"), tiny_fields["image_size"], strict=True))
    processor = DiffVPProcessor(DiffVPImageProcessor(size=size), tokenizer)
    model = DiffVPForConditionalGeneration.from_base(
        str(tiny_base_with_tokenizer),
        lora_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
        config={**tiny_fields, "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(tokenizer)},
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    monkeypatch.setattr(release_module, "POOL_SIZE", 2)
    released = release_module.release(tmp_path / "trained", tmp_path / "released")

    files = {str(path.relative_to(released)) for path in released.rglob("*") if path.is_file()}
    suffixes = {"safetensors", "json", "py", "md", "gz", "jinja", "txt", "LICENSE", "NOTICE"}
    assert {file.rsplit(".", 1)[-1] for file in files} <= suffixes
    assert len(json.loads((released / "references/references.json").read_text())) == 2
    stored = load_file(released / "model.safetensors")
    assert stored["resampler.queries"].dtype == torch.bfloat16
    assert stored["vision_encoder.resnet.bn1.running_var"].dtype == torch.float32

    for name in ("LICENSE", "NOTICE"):
        assert (released / name).read_bytes() == (repository_root / name).read_bytes()
    arguments = ["demo", "--checkpoint", str(released), "--output", str(tmp_path / "demo")]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    written = json.loads((tmp_path / "demo/report/report.json").read_text())
    card = (released / "README.md").read_text()
    assert written["report"] in card and written["truth"]["report"] in card
    assert f"with reference `{written['provenance']['reference']['id']}`" in card and "model-index" not in card

    loaded = AutoModel.from_pretrained(released, trust_remote_code=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=2**-8)
    reference = released / "references/normal_1.nii.gz"
    inputs = AutoProcessor.from_pretrained(released, trust_remote_code=True)(ct=str(reference))
    assert inputs.reference_ids == ["normal_2"], "a scan is never its own reference"
    assert loaded.generate(**inputs, max_new_tokens=3).shape == (1, 3)


@pytest.fixture(scope="module")
def hub(tiny_base_with_tokenizer):
    """Hub that holds the base LLM."""
    with Hub() as hub:
        hub.put(f"models/{BASE}", tiny_base_with_tokenizer)
        yield hub


@pytest.fixture(scope="module")
def pushable(tiny_base_with_tokenizer, tiny_fields, tokenizer, hub, tmp_path_factory):
    """Tiny checkpoint that can be uploaded; its base is on the test Hub."""
    revision = hub.repos[f"models/{BASE}"].branches["main"]
    folder = tmp_path_factory.mktemp("pushable") / "diffvp-tiny"
    return make_pushable(folder, tiny_base_with_tokenizer, tiny_fields, tokenizer, BASE, revision)


# Upload and download


@pytest.fixture(scope="module")
def fine_tuned(pushable, tmp_path_factory):
    """Checkpoint after more training, with other weights and other digests in its documents."""
    folder = Path(shutil.copytree(pushable, tmp_path_factory.mktemp("fine_tuned") / pushable.name))
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] += 0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["file_digests"]["model.safetensors"] = digest(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    document(folder)
    return folder


@pytest.fixture(scope="module")
def pushed(hub, pushable, fine_tuned, tmp_path_factory):
    """Commits of both checkpoints, pushed under one id. The process also pushes with the methods of transformers."""
    script = f"""
        from diffvp.hub.push import push
        first = push({str(pushable)!r}, "tester/diffvp-tiny", tag="v1")
        second = push({str(fine_tuned)!r}, "tester/diffvp-tiny", tag="v2")
        branch = push({str(pushable)!r}, "tester/diffvp-tiny", revision="trial")
        answer = [first.commit, second.commit, branch.commit, first.how_to_load()]

        from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
        from diffvp.pipeline_diffvp import DiffVPPipeline
        from diffvp.processing_diffvp import DiffVPProcessor
        push({str(pushable)!r}, "tester/carded")
        model = DiffVPForConditionalGeneration.from_pretrained({str(pushable)!r})
        processor = DiffVPProcessor.from_pretrained({str(pushable)!r}, trust_remote_code=False)
        model.push_to_hub("tester/apart")
        processor.push_to_hub("tester/apart")
        DiffVPPipeline(model=model, processor=processor, device="cpu").push_to_hub("tester/together")
        model.push_to_hub("tester/carded", revision="again")
        model.save_pretrained("saved", push_to_hub=True, repo_id="tester/saved")
    """
    *commits, how_to_load = run_client(hub, tmp_path_factory.mktemp("push"), script)
    assert how_to_load.count(commits[0]) == 2
    return commits


@pytest.mark.slow
def test_repository_holds_exactly_the_checkpoint(hub, pushed, pushable, fine_tuned):
    repo = hub.repos["models/tester/diffvp-tiny"]
    first, second, branch = pushed
    for commit, folder in ((first, pushable), (second, fine_tuned), (branch, pushable)):
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert repo.commits[commit] == {name: path.read_bytes() for name, path in files.items()}
    assert repo.tags == {"v1": first, "v2": second} and repo.branches == {"main": second, "trial": branch}
    assert len(repo.commits) == 4, "one commit each after the empty one"


@pytest.mark.slow
def test_pulled_checkpoints_equal_pushed_ones(hub, pushed, pushable, fine_tuned, tiny_base_with_tokenizer, tmp_path):
    """A user without the package loads both revisions by id; an adapter at the root is shown to load a bare LLM."""
    scan = write_scan(tmp_path / "scan.nii.gz", seed=5)
    trap = copy.deepcopy(hub.repos["models/tester/diffvp-tiny"])
    files = trap.commits[pushed[0]]
    trap.commit("main", files | {Path(name).name: files[name] for name in files if name.startswith("adapter/adapter")})
    hub.repos["models/tester/trap"] = trap
    script = f"""
        from safetensors.torch import save_file
        from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

        answer, logits = {{}}, {{}}
        for revision in {[*pushed[:2], "v1"]!r}:
            processor = AutoProcessor.from_pretrained("tester/diffvp-tiny", revision=revision, trust_remote_code=True)
            model = AutoModel.from_pretrained("tester/diffvp-tiny", revision=revision, trust_remote_code=True)
            inputs = processor(ct={str(scan)!r})
            logits[revision] = model(**inputs).logits
            answer[revision] = [type(model).__name__, inputs.reference_ids, model.generate(**inputs).tolist()]
        save_file(logits, "logits.safetensors")
        pinned = {{"revision": {pushed[0]!r}, "trust_remote_code": True}}
        pipe = pipeline("ct-report-generation", model="tester/diffvp-tiny", **pinned)
        answer["pipeline"] = pipe({str(scan)!r})["report"]
        other = AutoModelForImageTextToText.from_pretrained("tester/diffvp-tiny", **pinned)
        trapped = AutoModel.from_pretrained("tester/trap", trust_remote_code=True)
        answer["classes"] = [type(other).__name__, type(trapped).__name__]
        answer["package"] = "diffvp" in sys.modules
    """
    answer = run_client(hub, tmp_path, script, installed=False)
    logits = load_file(tmp_path / "logits.safetensors")
    for revision, folder in ((pushed[0], pushable), (pushed[1], fine_tuned), ("v1", pushable)):
        model = DiffVPForConditionalGeneration.from_pretrained(
            folder, base_model_name_or_path=str(tiny_base_with_tokenizer)
        )
        processor = DiffVPProcessor.from_pretrained(folder)
        inputs = processor(ct=str(scan))
        assert torch.equal(logits[revision], model(**inputs).logits)
        tokens = model.generate(**inputs)
        name, reference_ids, pulled = answer[revision]
        assert name == "DiffVPForConditionalGeneration" and reference_ids == inputs.reference_ids
        assert pulled == tokens.tolist()
    assert not torch.equal(logits[pushed[0]], logits[pushed[1]])
    assert answer["pipeline"] == processor.decode(tokens[0], skip_special_tokens=True).strip()
    # "LlamaModel": with an adapter at the root, transformers silently loads the bare LLM.
    assert answer["classes"] == ["DiffVPForConditionalGeneration", "LlamaModel"] and not answer["package"]


@pytest.mark.slow
def test_hf_upload_and_download_preserve_every_file(hub, pushable, tmp_path):
    for command in (["upload", "tester/by-hand", pushable, "."], ["download", "tester/by-hand", "--local-dir", "got"]):
        run_command(hub, tmp_path, "hf", *command)
    for path in pushable.rglob("*"):
        if path.is_file():
            assert (tmp_path / "got" / path.relative_to(pushable)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_transformers_push_to_hub_uploads_the_whole_checkpoint(hub, pushable, pushed):
    """`push_to_hub` of model, processor and pipeline, and `save_pretrained(push_to_hub=True)`, upload the adapter, the
    code and the references, and keep an existing card."""
    # transformers writes the loading arguments to tokenizer_config.json.
    documents = {"README.md", "evaluation.json", "LICENSE", "NOTICE", "tokenizer_config.json"}
    local = {
        path.relative_to(pushable).as_posix(): path.read_bytes() for path in pushable.rglob("*") if path.is_file()
    }
    expected = {name: content for name, content in local.items() if name not in documents}
    for name in ("apart", "together"):
        repo = hub.repos[f"models/tester/{name}"]
        found = dict(repo.commits[repo.branches["main"]])
        assert "Model Card" in found.pop("README.md").decode(), "transformers writes a placeholder"
        assert found.pop("tokenizer_config.json")
        assert found == expected, name
    again = hub.repos["models/tester/carded"]
    assert b"Research use only" in again.commits[again.branches["again"]]["README.md"]
    saved = hub.repos["models/tester/saved"]
    adapter = {name for name in expected if name.startswith("adapter/")}
    assert adapter <= set(saved.commits[saved.branches["main"]]), (
        "save_pretrained(push_to_hub=True) left the adapter out"
    )


@pytest.mark.slow
def test_push_failures_are_explained_and_leave_no_partial_upload(hub, pushable, pushed, tmp_path):
    hub.put("models/tester/foreign", write_foreign(tmp_path / "foreign"))
    hub.put("models/tester/pulled", pushable)
    always = {"/fails/commit/": 500, "/lost/commit/": LOST, "/untagged/tag/": 500}
    broken = [500, 403]  # one download fails; the next one succeeds at the second attempt

    def fail(method: str, path: str) -> int | None:
        if "/busy/preupload/" in path:  # a concurrent commit
            hub.repos["models/tester/busy"].commit("main", {"config.json": b"{}"})
        if "/pulled/resolve/" in path and path.endswith("/model.safetensors"):
            return broken.pop() if broken else None
        return next((always[part] for part in always if part in path), None)

    hub.fail = fail
    script = f"""
        import os
        from transformers import AutoModel
        from diffvp.hub.push import PushError, push
        answer = {{}}
        cases = {{"fails": {{}}, "busy": {{}}, "lost": {{}}, "foreign": {{}}, "apart/from/it": {{}}}}
        cases |= {{"untagged": {{"tag": "v1"}}, "diffvp-tiny": {{"tag": "v1"}}, "by-now": {{"private": True}}}}
        for repo, options in cases.items():
            try:
                answer[repo] = push({str(pushable)!r}, f"tester/{{repo}}", **options).commit
            except PushError as error:
                answer[repo] = str(error)
        try:
            push({str(pushable)!r}, "tester/diffvp-tiny", private=True)
        except PushError as error:
            answer["public"] = str(error)
        right, os.environ["HF_TOKEN"] = os.environ["HF_TOKEN"], "hf_wrong"
        try:
            push({str(pushable)!r}, "tester/token")
        except PushError as error:
            answer["token"] = str(error)
        os.environ["HF_TOKEN"] = right
        for name, revision in (("nowhere", None), ("diffvp-tiny", "v9"), ("pulled", None)):
            try:
                AutoModel.from_pretrained(f"tester/{{name}}", revision=revision, trust_remote_code=True)
            except OSError as error:
                answer[name, revision] = str(error)
        answer = {{str(key): value for key, value in answer.items()}}
        answer["again"] = type(AutoModel.from_pretrained("tester/pulled", trust_remote_code=True)).__name__
    """
    try:
        answer = run_client(hub, tmp_path, script)
    finally:
        hub.fail = lambda method, path: None
    assert "500 Internal Server Error" in answer["fails"]
    assert answer["fails"].endswith("- Nothing was uploaded; the repository was created and is empty.")
    assert list(hub.repos["models/tester/fails"].commits.values()) == [{}]
    assert "A commit has happened since" in answer["busy"]
    assert list(hub.repos["models/tester/busy"].commits.values()) == [{}, {"config.json": b"{}"}]
    lost = hub.repos["models/tester/lost"].branches["main"]
    assert f"The repository is at commit {lost}: this upload or another one" in answer["lost"]
    assert "Invalid credentials in Authorization header" in answer["token"]
    assert answer["token"].endswith("- Nothing was uploaded.") and "models/tester/token" not in hub.repos
    untagged = hub.repos["models/tester/untagged"]
    commit = untagged.branches["main"]
    assert f"Everything was uploaded as commit {commit}; only the tag v1 is missing." in answer["untagged"]
    assert "files that do not belong in a checkpoint (paper.pdf)" in answer["foreign"]
    assert set(hub.repos["models/tester/foreign"].branches) == {"main"}
    assert "The tag v1 already exists" in answer["diffvp-tiny"]
    assert "Nothing was uploaded" in answer["apart/from/it"] and "Repo id" in answer["apart/from/it"]
    assert hub.repos["models/tester/by-now"].private and len(answer["by-now"]) == 40
    assert "already exists and is public" in answer["public"]
    assert "tester/nowhere is not a local folder and is not a valid model identifier" in answer["('nowhere', None)"]
    assert "v9 is not a valid git identifier" in answer["('diffvp-tiny', 'v9')"]
    assert "couldn't connect" in answer["('pulled', None)"]
    assert answer["again"] == "DiffVPForConditionalGeneration" and not broken


def write_foreign(folder: Path) -> Path:
    folder.mkdir()
    (folder / "paper.pdf").write_bytes(b"%PDF")
    return folder


@pytest.mark.slow
def test_shipped_checkpoint_gives_the_same_logits_from_the_hub(hub, tmp_path):
    """After `diffvp push`, loading by id without the package gives the same logits."""
    said = run_command(hub, tmp_path, "diffvp", "push", SHIPPED_CHECKPOINT, "tester/diffvp-phantom", "--tag", "v0.1.0")
    commit = hub.repos["models/tester/diffvp-phantom"].tags["v0.1.0"]
    assert said.count(commit) == 3, "the commit, and code to load model and processor pinned to it"
    scan = write_scan(tmp_path / "scan.nii.gz", seed=5)
    script = f"""
        from safetensors.torch import save_file
        from transformers import AutoModel, AutoProcessor
        logits = {{}}
        for name, revision in (({str(SHIPPED_CHECKPOINT)!r}, "main"), ("tester/diffvp-phantom", {commit!r})):
            processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
            model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)
            logits[revision] = model(**processor(ct={str(scan)!r})).logits
        save_file(logits, "logits.safetensors")
        answer = type(model).__name__
    """
    assert run_client(hub, tmp_path, script, installed=False) == "DiffVPForConditionalGeneration"
    logits = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(logits["main"], logits[commit])
