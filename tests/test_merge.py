import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import cli

from opencharacter import cache, lora, models
from opencharacter.errors import UserError
from opencharacter.lora import allowed_rank
from opencharacter.persona.merge import WeightedAdapter, merge, parse_weighted_adapter

PREFIX = lora.PEFT_PREFIX
SHAPES = {"model.layers.0.q_proj": (8, 12), "model.layers.0.up_proj": (16, 8)}


def write_adapter(path, rank, seed, shapes=None, alpha=None):
    torch.manual_seed(seed)
    tensors = {}
    for module, (out, into) in (shapes or SHAPES).items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, into)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, rank)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"r": rank, "lora_alpha": alpha or 2 * rank, "peft_type": "LORA"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def update(path, module):
    config, updates = lora.adapter_updates(path)
    a, b = updates[module]
    return lora.scale(config) * (b.double() @ a.double())


def test_the_merge_is_the_exact_weighted_sum(tmp_path):
    one = write_adapter(tmp_path / "one", 4, 1)
    two = write_adapter(tmp_path / "two", 6, 2, alpha=3)
    (tmp_path / "out").mkdir()
    composition = merge(
        [WeightedAdapter(one, 1.0), WeightedAdapter(two, -0.25)], tmp_path / "out", "base/name"
    )
    for module in ("model.layers.0.q_proj", "model.layers.0.up_proj"):
        expected = update(one, module) - 0.25 * update(two, module)
        result = update(tmp_path / "out", module)
        assert torch.norm(result - expected) / torch.norm(expected) < 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        config["r"] == config["lora_alpha"] == 16
    )  # 4 + 6, rounded up to a rank that vLLM supports
    assert config["base_model_name_or_path"] == "base/name"
    assert composition["rank"] == 10


def test_adapters_of_different_shapes_are_refused(tmp_path):
    one = write_adapter(tmp_path / "one", 4, 1)
    two = write_adapter(tmp_path / "two", 4, 2, shapes={"model.layers.0.q_proj": (8, 12)})
    with pytest.raises(UserError, match="up_proj"):
        merge([WeightedAdapter(one, 1.0), WeightedAdapter(two, 1.0)], tmp_path, "base")


def merged(folder, adapters, **options):
    folder.mkdir()
    return merge(adapters, folder, "base", **options), update(folder, "model.layers.0.q_proj")


def test_reducing_the_rank_gives_the_best_low_rank_approximation(tmp_path):
    adapters = [WeightedAdapter(write_adapter(tmp_path / str(n), 4, n), 1.0) for n in range(2)]
    _, exact = merged(tmp_path / "exact", adapters)
    composition, result = merged(tmp_path / "small", adapters, rank=3)
    assert torch.linalg.matrix_rank(result.float(), rtol=1e-4) == 3
    u, s, v = torch.linalg.svd(exact)
    assert torch.allclose(result, u[:, :3] @ torch.diag(s[:3]) @ v[:3], atol=1e-4)
    exact_updates = [update(tmp_path / "exact", m) for m in SHAPES]
    errors = [w - update(tmp_path / "small", m) for w, m in zip(exact_updates, SHAPES, strict=True)]
    error = torch.norm(torch.cat([x.flatten() for x in errors]))
    error = error / torch.norm(torch.cat([x.flatten() for x in exact_updates]))
    assert composition["relative_error"] == pytest.approx(float(error), rel=1e-4)
    assert composition["rank"] == 3


def test_a_module_with_fewer_outputs_than_the_reduced_rank_is_merged_exactly(tmp_path):
    """Such as the keys of a small model in a blend of several personas."""
    shapes = {"model.layers.0.q_proj": (3, 20), "model.layers.0.k_proj": (16, 12)}
    adapters = [
        WeightedAdapter(write_adapter(tmp_path / str(n), 4, n, shapes), 1.0) for n in range(2)
    ]
    _, exact = merged(tmp_path / "exact", adapters)
    _, result = merged(tmp_path / "small", adapters, rank=6)
    assert torch.allclose(result, exact, atol=1e-4)


def test_keeping_the_full_rank_is_exact(tmp_path):
    adapters = [WeightedAdapter(write_adapter(tmp_path / str(n), 4, n), 1.0) for n in range(2)]
    assert merged(tmp_path / "exact", adapters)[0]["relative_error"] == 0
    assert merged(tmp_path / "same", adapters, rank=99)[0]["rank"] == 8


def test_the_merge_equals_that_of_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(12, 8)

    def config():
        return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)

    torch.manual_seed(3)
    net = get_peft_model(Net(), config(), "one")
    net.add_adapter("two", config())
    net.save_pretrained(str(tmp_path / "peft"))
    net.add_weighted_adapter(["one", "two"], [1.0, -0.5], "both", combination_type="linear")
    expected = net.base_model.model.q_proj.get_delta_weight("both").double()
    adapters = [
        WeightedAdapter(tmp_path / "peft/one", 1.0),
        WeightedAdapter(tmp_path / "peft/two", -0.5),
    ]
    (tmp_path / "out").mkdir()
    composition = merge(adapters, tmp_path / "out", "base", peft_linear=True)
    assert torch.allclose(update(tmp_path / "out", "q_proj"), expected, atol=1e-5)
    assert composition["relative_error"] > 0.1  # the reported distance from the exact sum


def test_unmergeable_adapters_are_refused(tmp_path):
    one = write_adapter(tmp_path / "one", 4, 1)
    two = write_adapter(tmp_path / "two", 8, 2)
    with pytest.raises(UserError, match=r"ranks \[4, 8\]"):
        merge([WeightedAdapter(one, 1.0), WeightedAdapter(two, 1.0)], tmp_path, peft_linear=True)
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        merge([WeightedAdapter(tmp_path / "three", 1.0)], tmp_path)
    config = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "other"})
    )
    with pytest.raises(UserError, match="different base models: None and other"):
        merge([WeightedAdapter(one, 1.0), WeightedAdapter(two, 1.0)], tmp_path)
    (two / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        merge([WeightedAdapter(one, 1.0), WeightedAdapter(two, 1.0)], tmp_path)


def unusual_adapter(path, extra=None, **config):
    """An adapter with additional tensors, or another configuration."""
    write_adapter(path, 4, 1)
    tensors = load_file(path / lora.ADAPTER_WEIGHTS)
    save_file(tensors | (extra or {}), path / lora.ADAPTER_WEIGHTS)
    original = json.loads((path / lora.ADAPTER_CONFIG).read_text())
    (path / lora.ADAPTER_CONFIG).write_text(json.dumps(original | config))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q_proj.bias",
        "model.layers.0.q_proj.lora_B.bias",
        "model.layers.0.q_proj.lora_magnitude_vector",
        "model.embed_tokens.lora_embedding_A",
        "model.layers.0.k_proj.lora_A.weight",
    ],
)
def test_unsupported_adapter_tensors_are_refused_and_not_dropped(tmp_path, name):
    odd = unusual_adapter(tmp_path / "odd", {PREFIX + name: torch.ones(4, 4)})
    with pytest.raises(UserError, match=r"k_proj\.lora_B" if "k_proj" in name else name):
        merge([WeightedAdapter(odd, 1.0)], tmp_path)


def test_an_incomplete_or_foreign_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="peft_type 'IA3'"):
        merge(
            [WeightedAdapter(unusual_adapter(tmp_path / "other", peft_type="IA3"), 1.0)], tmp_path
        )
    empty = unusual_adapter(tmp_path / "empty")
    save_file({}, empty / lora.ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="nothing is"):
        merge([WeightedAdapter(empty, 1.0)], tmp_path)
    (empty / lora.ADAPTER_WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        merge([WeightedAdapter(empty, 1.0)], tmp_path)


UNSUPPORTED = {
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [1, 2],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "layer_replication": [[0, 4], [2, 5]],
    "trainable_token_indices": [3],
    "fan_in_fan_out": True,
    "loftq_config": {"loftq_bits": 4},
    "a_field_of_the_future": 1,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_could_change_the_update_is_refused(tmp_path, field):
    odd = unusual_adapter(tmp_path / "odd", **{field: UNSUPPORTED[field]})
    with pytest.raises(UserError, match=rf"adapter {odd}: adapters with {field} = "):
        merge([WeightedAdapter(odd, 1.0)], tmp_path)


@pytest.mark.parametrize("initialization", ["olora", "pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_an_initialization_that_changes_the_base_model_is_refused(tmp_path, initialization):
    odd = unusual_adapter(tmp_path / "odd", init_lora_weights=initialization)
    with pytest.raises(UserError, match="init_lora_weights"):
        merge([WeightedAdapter(odd, 1.0)], tmp_path)


@pytest.mark.parametrize("initialization", [True, False, "gaussian", "orthogonal", "eva"])
def test_an_initialization_that_keeps_the_base_model_is_merged(tmp_path, initialization):
    adapter = unusual_adapter(
        tmp_path / "one", init_lora_weights=initialization, eva_config={"rho": 1}
    )
    if initialization != "eva":
        config = json.loads((adapter / lora.ADAPTER_CONFIG).read_text()) | {"eva_config": None}
        (adapter / lora.ADAPTER_CONFIG).write_text(json.dumps(config))
    assert merged(tmp_path / "out", [WeightedAdapter(adapter, 1.0)])[0]["rank"] == 4


def test_every_default_of_peft_is_supported(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = write_adapter(tmp_path / "one", 4, 1)
    config.save_pretrained(str(adapter))
    assert lora.read_config(adapter)["r"] == 4


INVALID_CONFIGS = {
    "broken JSON": ('{"r": 4,', "is not valid JSON"),
    "a list": ("[1]", "contains a list"),
    "an LFS pointer": ("version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "no rank": ({"r": None}, "r = None must be a positive integer"),
    "rank 0": ({"r": 0}, "r = 0 must be a positive integer"),
    "a text as rank": ({"r": "8"}, "r = '8' must be a positive integer"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha = None must be a number"),
    "another rank than the weights": ({"r": 8}, r"r = 8, but .*lora_A.* has shape \(4, "),
}


@pytest.mark.parametrize("case", INVALID_CONFIGS)
def test_an_invalid_configuration_is_one_line(tmp_path, case):
    text, message = INVALID_CONFIGS[case]
    odd = unusual_adapter(tmp_path / "odd", **(text if isinstance(text, dict) else {}))
    if isinstance(text, str):
        (odd / lora.ADAPTER_CONFIG).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        merge([WeightedAdapter(odd, 1.0)], tmp_path)
    assert str(odd) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    one = write_adapter(tmp_path / "one", 4, 1)
    tensors = load_file(one / lora.ADAPTER_WEIGHTS)
    tensors[f"{PREFIX}model.layers.0.up_proj.lora_B.weight"][3, 2] = value
    save_file(tensors, one / lora.ADAPTER_WEIGHTS)
    message = r"up_proj\.lora_B\.weight in adapter_model\.safetensors contains nan or inf"
    with pytest.raises(UserError, match=message):
        merge([WeightedAdapter(one, 1.0)], tmp_path)


def test_damaged_weights_are_reported_with_their_file_and_size(tmp_path):
    one = write_adapter(tmp_path / "one", 4, 1)
    path = one / lora.ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{path} \([\d,]+ bytes\) is truncated or damaged"):
        merge([WeightedAdapter(one, 1.0)], tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    ran = cli("merge", "one", "--to", "out", cwd=tmp_path)
    assert ran.returncode == 2
    assert "Git LFS pointer" in ran.stdout
    assert "git lfs pull" in ran.stdout


def test_a_damaged_base_model_is_reported_with_its_file(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / models.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    adapter = write_adapter(tmp_path / "one", 4, 1)
    with pytest.raises(UserError, match=rf"{base / models.WEIGHTS} .*Git LFS pointer"):
        models.merge_into_base(base, adapter)


def test_one_base_model_with_two_names_is_merged_with_the_base_option(tmp_path):
    unusual_adapter(tmp_path / "one", base_model_name_or_path="/models/llama")
    unusual_adapter(tmp_path / "two", base_model_name_or_path="meta/llama")
    ran = cli("merge", "one", "two", "--to", "out", cwd=tmp_path)
    assert ran.returncode == 2
    assert "choose one with --base NAME" in ran.stdout
    ran = cli("merge", "one", "two", "--to", "out", "--base", "meta/llama", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout
    config = json.loads((tmp_path / "out" / lora.ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "meta/llama"


@pytest.mark.parametrize("weight", ["nan", "inf", "much"])
def test_a_weight_that_is_no_finite_number_is_refused(weight):
    with pytest.raises(UserError, match="is not a number"):
        parse_weighted_adapter(f"folder:{weight}")


def test_a_merge_that_fills_the_disk_names_it(tmp_path, small_disk):
    wide = {"model.layers.0.q_proj": (1000, 1000)}
    write_adapter(tmp_path / "one", 512, 1, shapes=wide)
    ran = cli("merge", "one", "--to", str(small_disk / "out"), cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stdout.startswith(f"failed: cannot write {small_disk}/out ("), ran.stderr
    assert "No space left" in ran.stdout
    assert not list(small_disk.iterdir())


def test_the_blend_command_blends_adapters(tmp_path):
    one = write_adapter(tmp_path / "one", 4, 1)
    write_adapter(tmp_path / "two", 4, 2)
    ran = cli("merge", "one", "two:-0.5", "--to", "out", cwd=tmp_path)
    assert "rank 8" in ran.stdout, ran.stderr
    expected = update(one, "model.layers.0.q_proj") - 0.5 * update(
        tmp_path / "two", "model.layers.0.q_proj"
    )
    assert torch.allclose(update(tmp_path / "out", "model.layers.0.q_proj"), expected, atol=1e-5)
    modes = {oct(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {oct((tmp_path / "one/adapter_config.json").stat().st_mode)}
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "one").stat().st_mode
    again = cli("merge", "one", "--to", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "it exists already" in again.stdout


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (9, 16), (64, 64), (65, 128), (512, 512)])
def test_ranks_are_rounded_up_to_a_rank_that_vllm_supports(rank, allowed):
    assert allowed_rank(rank) == allowed


def test_a_rank_over_the_limit_of_the_engine_is_refused():
    with pytest.raises(UserError, match="513"):
        allowed_rank(513)


def test_merging_into_the_base_equals_the_model_with_its_adapter(tiny_model, tmp_path, monkeypatch):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model)
        expected = PeftModel.from_pretrained(fresh, tmp_path / "adapter")(ids).logits
        folder = models.merge_into_base(tiny_model, tmp_path / "adapter")
        result = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.allclose(result, expected, atol=1e-4)
    assert (
        models.merge_into_base(tiny_model, tmp_path / "adapter") == folder
    )  # the second call reuses the result
    assert (folder / "chat_template.jinja").is_file()
    config = tmp_path / "adapter" / lora.ADAPTER_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 32}))
    assert models.merge_into_base(tiny_model, tmp_path / "adapter") != folder


def test_on_a_full_disk_the_merged_copies_that_were_used_longest_ago_are_deleted(
    tmp_path, monkeypatch
):
    for name, hours in (("oldest", 3), ("older", 2), ("old", 1), ("new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("x")
        then = time.time() - 3600 * hours
        os.utime(tmp_path / name, (then, then))

    def usage(folder):
        return SimpleNamespace(free=10 * (4 - len(list(folder.iterdir()))))

    monkeypatch.setattr(cache.shutil, "disk_usage", usage)
    cache.make_space(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 4
    cache.make_space(tmp_path, 20)
    assert {folder.name for folder in tmp_path.iterdir()} == {"old", "new"}
    cache.make_space(tmp_path, 1000)  # the new one may be in use
    assert [folder.name for folder in tmp_path.iterdir()] == ["new"]


def test_a_merged_copy_that_is_used_again_counts_as_new(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    base, _ = copy_of(tiny_model, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    folder = models.merge_into_base(base, adapter)
    os.utime(folder, (0, 0))
    assert models.merge_into_base(base, adapter) == folder
    assert folder.stat().st_mtime > time.time() - 60


def test_merging_into_the_base_refuses_an_adapter_of_another_model(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    adapter = write_adapter(tmp_path / "one", 4, 1)
    with pytest.raises(UserError, match="no weight"):
        models.merge_into_base(tiny_model, adapter)
    assert not list((tmp_path / "cache" / "merged").iterdir())


def copy_of(model, folder):
    """A copy of a model that a test may change, and its weights."""
    shutil.copytree(model, folder)
    return folder, load_file(folder / models.WEIGHTS)


def adapter_of(tiny_model, folder):
    """An adapter of all linear layers of the tiny model with random weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def test_a_second_copy_of_the_weights_in_mistral_s_format_is_not_kept_beside_the_merged_ones(
    tiny_model, tmp_path, monkeypatch
):
    """VLLM prefers that copy, so that a persona's engine would generate with the base's weights."""
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    base, weights = copy_of(tiny_model, tmp_path / "base")
    copy = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(copy, base / "consolidated.safetensors")
    (base / "consolidated.safetensors.index.json").write_text("{}")
    (base / "params.json").write_text("{}")
    merged = models.merge_into_base(base, adapter_of(tiny_model, tmp_path / "adapter"))
    assert [path.name for path in merged.glob("*.safetensors")] == [models.WEIGHTS]
    assert not list(merged.glob("consolidated*")) + list(merged.glob("params.json"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not load_file(merged / models.WEIGHTS)[name].equal(weights[name])
    footprints = (models.memory_footprint(folder) for folder in (base, tiny_model))
    assert len({footprint.weights for footprint in footprints}) == 1


def test_quantized_weights_are_refused_and_not_added_to_as_if_they_had_no_scales(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    base, weights = copy_of(tiny_model, tmp_path / "base")
    name = "model.layers.1.mlp.up_proj.weight"
    weights |= {name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    save_file(weights, base / models.WEIGHTS, metadata={"format": "pt"})
    adapter = adapter_of(tiny_model, tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"{name} is quantized \(F8_E4M3\).*BF16"):
        models.merge_into_base(base, adapter)


def test_an_adapter_of_a_model_with_other_shapes_is_refused_in_one_line(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENCHARACTER_CACHE", str(tmp_path / "cache"))
    adapter = write_adapter(tmp_path / "one", 4, 1, {"model.layers.0.self_attn.q_proj": (8, 12)})
    with pytest.raises(UserError, match=r"q_proj.weight has shape \(64, 64\).*update \(8, 12\)"):
        models.merge_into_base(tiny_model, adapter)


def test_a_damaged_embedded_model_is_converted_again(embedded_model, tmp_path, monkeypatch):
    weights = load_file(embedded_model / models.WEIGHTS)
    assert all(t.dtype == torch.bfloat16 for t in weights.values())
    record = json.loads((embedded_model / "conversion.json").read_text())
    assert record["weights_sha256"] == cache.file_hash(embedded_model / models.WEIGHTS)
