"""Slider files against diffusers' loading, peft, and files that were put together by hand."""

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders import ModuleChange, Slider
from geoedit.sliders.calibration import Calibration
from geoedit.sliders.files import load, save
from manifolds import LowRank
from tests.geoedit.sliders.slider_cases import apart, denoiser_of, draw, random_slider

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def attention(path: str) -> bool:
    return "attn" in path and "norm" not in path


@contextmanager
def adapter(pipe: Any, path: Path, scale: float) -> Iterator[None]:
    """The same file by diffusers' own means."""
    pipe.load_lora_weights(path, adapter_name="theirs")
    pipe.set_adapters(["theirs"], [scale])
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def products(slider: Slider) -> dict[tuple[str, str], Tensor]:
    return {(component, path): change.matrix.dense() for component, path, change in slider}


def assert_same(first: Slider, second: Slider, tolerance: float = 1e-6) -> None:
    ours, theirs = products(first), products(second)
    assert ours.keys() == theirs.keys()
    for place, value in ours.items():
        assert torch.allclose(value, theirs[place], atol=tolerance), place


def foreign(path: Path) -> Path:
    """The file without what is ours in its metadata."""
    other = path.with_name(f"foreign-{path.name}")
    save_file(load_file(path), other)
    return other


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_both_formats_draw_the_same_image_in_diffusers(form: str, tiny_pipe: Any, tmp_path: Path) -> None:
    name, path = denoiser_of(tiny_pipe), tmp_path / "moved.safetensors"
    whole = form == "diffusers" or name == "unet"  # diffusers reads kohya's Flux names of attention only
    slider = random_slider(
        tiny_pipe, name, ranks=(2, 1, 3), size=0.05, among=(lambda _: True) if whole else attention
    )
    save(slider, path, form)
    assert_same(load(path), slider)
    assert_same(load(foreign(path), tiny_pipe), slider)
    with slider.at(tiny_pipe, -1.5):
        ours = draw(tiny_pipe)
    if form == "kohya" and type(tiny_pipe).__name__ == "StableDiffusion3Pipeline":
        return  # diffusers reads no file of kohya's for it; `save` says so
    with adapter(tiny_pipe, path, -1.5):
        assert apart(draw(tiny_pipe), ours) < 1e-5


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoders_in_diffusers(
    family: str, form: str, fresh_pipe: Callable[..., Any], tmp_path: Path
) -> None:
    pipe, path = fresh_pipe(family), tmp_path / "moved.safetensors"
    names = ["text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])]
    slider = random_slider(pipe, *names, among=lambda path: path.endswith(TEXT), ranks=(2, 1))
    save(slider, path, form)
    assert_same(load(foreign(path), pipe), slider)
    with slider.at(pipe, 0.8):
        ours = draw(pipe)
    with load(foreign(path)).at(pipe, 0.8):  # names by guess: CLIP's level of one release or another
        assert apart(draw(pipe), ours) < 1e-6
    pipe.load_lora_weights(path, adapter_name="theirs")
    pipe.set_adapters(["theirs"], [0.8])
    assert apart(draw(pipe), ours) < 1e-5


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_what_is_known_comes_back(form: str, tiny_sd1: Any, tmp_path: Path) -> None:
    slider = dataclasses.replace(
        random_slider(tiny_sd1, "unet", among=attention, name="age 年"),
        calibration=Calibration("age", (-1.0, 0.0, 1.0), (-0.5, 0.0, 1.0)),
        details={"spec": {"target": "a person"}, "measured": {"safe_range": [-1.0, 2.5]}},
    )
    slider.to(torch.float16).save(tmp_path, format=form)
    back = load(tmp_path)
    assert (back.name, back.details, back.safe_range) == (slider.name, slider.details, (-1.0, 2.5))
    assert back.factor(-1.0) == -0.5
    assert all(torch.equal(change.matrix.left, slider.changes[part][path].matrix.left.half())
               for part, path, change in back)  # fmt: skip
    assert back.changes["unet"].keys() == slider.changes["unet"].keys()


def published(slider: Slider, prefix: str = "lora_unet") -> dict[str, Tensor]:
    """The tensors of the published trainer's network: α = 1, no metadata."""
    tensors = {}
    for _, path, change in slider:
        key = f"{prefix}_{path.replace('.', '_')}"
        ones = (1,) * len(change.kernel)
        tensors[f"{key}.lora_up.weight"] = change.matrix.left.reshape(*change.matrix.left.shape, *ones)
        right = change.matrix.right
        tensors[f"{key}.lora_down.weight"] = right.unflatten(1, (-1, *change.kernel)) if ones else right
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_published_sliders(family: str, ending: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pipe = request.getfixturevalue(f"tiny_{family}")
    slider = random_slider(pipe, denoiser_of(pipe), among=attention, ranks=(4,))
    path = tmp_path / f"age{ending}"
    (torch.save if ending == ".pt" else save_file)(published(slider), path)
    quarter = slider.map(lambda matrix: matrix * (1 / matrix.rank))
    assert_same(load(path, pipe), quarter)
    guessed = load(path)
    assert_same(guessed, quarter)
    assert guessed.name == "age"
    with guessed.at(pipe, 1.0):
        draw(pipe)


def test_sdxl_in_the_names_of_its_first_release(tiny_sdxl: Any, tmp_path: Path) -> None:
    """Blocks are counted through: with one layer a block, input block 2 is the downsampler of block 0."""
    names = {
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_3_1_transformer_blocks_1_attn2_to_k":
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        "middle_block_1_transformer_blocks_0_attn1_to_out_0":
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "output_blocks_1_1_proj_in": "up_blocks.0.attentions.1.proj_in",
        "output_blocks_2_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
        "label_emb_0_0": "add_embedding.linear_1",
        "time_embed_2": "time_embedding.linear_2",
    }  # fmt: skip
    slider = random_slider(tiny_sdxl, "unet", among=lambda path: path in names.values())
    tensors = {}
    for old, new in names.items():
        change = slider.changes["unet"][new]
        for role, value in published(Slider("one", {"unet": {"x": change}})).items():
            tensors[f"lora_unet_{old}.{role.split('.', 1)[1]}"] = value
    path = tmp_path / "first.safetensors"
    save_file(tensors, path)
    read = load(path, tiny_sdxl)
    assert read.changes["unet"].keys() == slider.changes["unet"].keys()
    with read.at(tiny_sdxl, 2.0):
        ours = draw(tiny_sdxl)
    with adapter(tiny_sdxl, path, 2.0):
        assert apart(draw(tiny_sdxl), ours) < 1e-5


def test_flux_with_fused_matrices(tiny_flux: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    width, words = 32, 3 * 32
    sizes = {
        "double_blocks_0_img_attn_qkv": (words, width),
        "double_blocks_0_txt_attn_qkv": (words, width),
        "double_blocks_0_img_attn_proj": (width, width),
        "double_blocks_0_txt_mlp_0": (4 * width, width),
        "double_blocks_0_img_mod_lin": (6 * width, width),
        "single_blocks_0_linear2": (width, 5 * width),
    }
    tensors = {}
    for name, (out, inputs) in sizes.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = 0.1 * torch.randn(out, 6, generator=generator)
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(6, inputs, generator=generator)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(3.0)
    up = tensors["lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight"]  # one that was fused from three
    for part in range(3):
        keep = torch.zeros(6)
        keep[2 * part : 2 * part + 2] = 1.0
        up[part * width : (part + 1) * width] *= keep
    path = tmp_path / "fused.safetensors"
    save_file(tensors, path)
    slider = load(path, tiny_flux)
    assert slider.changes["transformer"]["transformer_blocks.0.attn.add_k_proj"].matrix.rank == 2
    assert_same(load(path), slider)
    with slider.at(tiny_flux, 1.0):
        ours = draw(tiny_flux)
    with adapter(tiny_flux, path, 1.0):
        assert apart(draw(tiny_flux), ours) < 1e-5
    up = torch.randn(7 * width, 2, generator=generator)  # q, k, v and the MLP of a single block
    down = torch.randn(2, width, generator=generator)
    words_in = {"up": torch.ones(width, 1), "down": torch.ones(1, 16)}
    linear = {f"lora_unet_single_blocks_0_linear1.lora_{role}.weight": value
              for role, value in (("up", up), ("down", down))}  # fmt: skip
    linear |= {f"lora_unet_txt_in.lora_{role}.weight": value for role, value in words_in.items()}
    save_file(linear, path)
    found = load(path, tiny_flux).changes["transformer"]
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    whole = torch.cat([found[f"single_transformer_blocks.0.{name}"].matrix.dense() for name in names])
    assert torch.allclose(whole, up @ down, atol=1e-5)
    assert torch.equal(found["context_embedder"].matrix.dense(), torch.ones(width, 16))


def test_flux_of_xlabs_and_old_processors(tiny_flux: Any, tiny_sd1: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "old.safetensors"
    tensors = {}
    sizes = {
        "double_blocks.0.processor.qkv_lora1": 96,
        "double_blocks.0.processor.qkv_lora2": 96,
        "double_blocks.0.processor.proj_lora1": 32,
        "single_blocks.0.processor.qkv_lora": 96,
    }
    for place, out in sizes.items():
        tensors[f"{place}.down.weight"] = 0.2 * torch.randn(2, 32, generator=generator)
        tensors[f"{place}.up.weight"] = 0.2 * torch.randn(out, 2, generator=generator)
    save_file(tensors, path)
    with load(path, tiny_flux).at(tiny_flux, 1.0):
        ours = draw(tiny_flux)
    with adapter(tiny_flux, path, 1.0):
        assert apart(draw(tiny_flux), ours) < 1e-5
    slider = random_slider(tiny_sd1, "unet", among=lambda name: name.endswith(("to_q", "to_out.0")))
    old = {}
    for _, name, change in slider:
        block, _, layer = name.rpartition(".processor.") if ".processor." in name else name.partition(".to_")
        key = f"unet.{block}.processor.to_{layer.split('.')[0]}_lora"
        old |= {f"{key}.down.weight": change.matrix.right, f"{key}.up.weight": change.matrix.left}
    save_file(old, path)
    assert_same(load(path, tiny_sd1), slider)
    assert_same(load(path), slider)
    with slider.at(tiny_sd1, 1.0):
        ours = draw(tiny_sd1)
    with adapter(tiny_sd1, path, 1.0):
        assert apart(draw(tiny_sd1), ours) < 1e-5


def test_a_folder_of_peft(tiny_model: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    slider = random_slider(tiny_model, "model", among=lambda path: "lm_head" not in path, ranks=(2, 3))
    save(slider, tmp_path / "adapter", "peft")
    assert_same(load(tmp_path / "adapter", tiny_model), slider)
    ids = torch.arange(3, 9).reshape(1, 6)
    with slider.at(tiny_model, 1.0):
        ours = tiny_model(ids).logits
    theirs = PeftModel.from_pretrained(tiny_model, tmp_path / "adapter")
    assert apart(ours, theirs(ids).logits) < 1e-5
    save_file(load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
              tmp_path / "adapter" / "adapter_model.safetensors")  # fmt: skip
    assert_same(load(tmp_path / "adapter", theirs.unload()), slider)
    save(slider, tmp_path / "model.safetensors")
    assert_same(load(tmp_path / "model.safetensors"), slider)


def test_files_that_are_no_sliders(tiny_sd1: Any, tiny_sd3: Any, tmp_path: Path) -> None:
    slider = random_slider(tiny_sd1, "unet", among=attention)
    path = tmp_path / "whole.safetensors"
    save(slider, path)
    with pytest.raises(EditError, match="there is no file"):
        load(tmp_path / "absent.safetensors")
    with pytest.raises(EditError, match="holds neither"):
        (tmp_path / "empty").mkdir()
        load(tmp_path / "empty")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EditError, match="not a whole safetensors file"):
        load(cut)
    for file in (path, foreign(path)):
        with pytest.raises(EditError, match=r"transformer|no unet|has no module"):
            load(file, tiny_sd3)
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float("nan")}, cut)
    with pytest.raises(EditError, match="NaN"):
        load(cut, tiny_sd1)
    save_file({"conv.weight": torch.ones(2, 2)}, cut)
    with pytest.raises(EditError, match="no factors of a LoRA"):
        load(cut)
    save_file({"lora_unet_mid.diff_b": torch.ones(2), **published(slider)}, cut)
    with pytest.raises(EditError, match="bias"):
        load(cut)
    for header, message in (({"version": 99}, "version 99"), ({"version": 1}, "damaged"), ([], "damaged")):
        save_file(tensors, cut, {"geoedit.slider": json.dumps(header)})
        with pytest.raises(EditError, match=message):
            load(cut)
    unsafe = tmp_path / "unsafe.pt"
    unsafe.write_bytes(pickle.dumps(Path("/")))
    with pytest.raises(EditError, match=r"unsafe\.pt"):
        load(unsafe)


def test_sliders_that_cannot_be_saved(tiny_sd1: Any, tiny_flux: Any, tmp_path: Path) -> None:
    slider = random_slider(tiny_sd1, "unet", among=attention)
    with pytest.raises(EditError, match=r"must end with \.safetensors"):
        slider.save(tmp_path / "slider.pt")
    with pytest.raises(EditError, match="no folder"):
        slider.save(tmp_path / "nowhere" / "slider.safetensors")
    with pytest.raises(EditError, match="for one model"):
        slider.save(tmp_path / "folder", "peft")
    with pytest.raises(EditError, match="not plain JSON"):
        dataclasses.replace(slider, details={"x": float("nan")}).save(tmp_path / "slider.safetensors")
    with pytest.raises(EditError, match="NaN"):
        slider.map(lambda matrix: matrix * float("nan")).save(tmp_path / "slider.safetensors")
    with pytest.raises(EditError, match="rank 0"):
        none = ModuleChange(LowRank.zeros(2, 2))
        Slider("none", {"unet": {"x": none}}).save(tmp_path / "slider.safetensors")
    assert list(tmp_path.iterdir()) == []
