"""Files of kohya, LyCORIS and diffusers: against the layers that such an adapter runs, written out."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import conv2d

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.kohya_names import diffusers_name, guessed_path
from peft_analysis.updates.read import read_update
from peft_analysis.updates.weights import Weights

KEY = "lora_unet_down_blocks_0_attentions_1_to_q"
NAME = "down_blocks.0.attentions.1.to_q.weight"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 8)
        self.proj_in = nn.Conv2d(3, 5, 3)
        self.point = nn.Conv2d(4, 4, 1)
        self.to_out = nn.ModuleList([nn.Linear(6, 6)])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Module()
        block.attentions = nn.ModuleList([Attention(), Attention()])
        self.down_blocks = nn.ModuleList([block])


def write(tmp_path, tensors, suffix="safetensors", **metadata):
    path = tmp_path / f"lora.{suffix}"
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata or None)
    return path


def linear(key=KEY, rank=2, alpha=None, out=8, inputs=6, **names):
    down, up = names.get("down", "lora_down"), names.get("up", "lora_up")
    found = {f"{key}.{down}.weight": normal(rank, inputs), f"{key}.{up}.weight": normal(out, rank, seed=1)}
    return found if alpha is None else {**found, f"{key}.alpha": torch.tensor(float(alpha))}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("rank", "alpha", "scale"), [(2, 1, 0.5), (4, 8, 2.0), (1, None, 1.0), (3, -3, -1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_linear_layer(suffix, rank, alpha, scale, dtype, tmp_path, device):
    tensors = {name: value.to(dtype) for name, value in linear(rank=rank, alpha=alpha).items()}
    base = Net().to(device)
    update = read_update(base, write(tmp_path, tensors, suffix))
    assert list(update) == [NAME] and update[NAME].device.type == device.type
    down, up = list(tensors.values())[:2]
    x = normal(5, 6, seed=3).to(device)
    wanted = scale * (x @ down.float().to(device).mT) @ up.float().to(device).mT
    torch.testing.assert_close(x @ update[NAME].mT, wanted, rtol=1e-5, atol=1e-5)
    assert isinstance(update[NAME], LowRank) and update[NAME].dtype == torch.float32
    entry = update.entries[NAME]
    assert entry.details["rank"] == rank and entry.details["file_name"] == KEY and entry.rounded is None


@pytest.mark.parametrize("tucker", [True, False])
def test_a_convolution_is_the_two_or_three_convolutions_in_a_row(tucker, tmp_path):
    key = KEY.replace("to_q", "proj_in")
    down = normal(2, 3, 1, 1) if tucker else normal(2, 3, 3, 3)
    mid, up = normal(4, 2, 3, 3, seed=1), normal(5, 4 if tucker else 2, 1, 1, seed=2)
    tensors = {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(1.0),
    }
    if tucker:
        tensors[f"{key}.lora_mid.weight"] = mid
    update = read_update(Net(), write(tmp_path, tensors))
    (name,) = update
    x = normal(1, 3, 7, 7, seed=4)
    inner = conv2d(conv2d(x, down), mid) if tucker else conv2d(x, down)
    rank = update[name].rank
    torch.testing.assert_close(conv2d(x, update.dense(name)), conv2d(inner, up) / rank, rtol=1e-4, atol=1e-4)


def test_factors_of_a_1x1_convolution_may_be_matrices(tmp_path):
    key = KEY.replace("to_q", "point")
    update = read_update(Net(), write(tmp_path, linear(key, out=4, inputs=4)))
    tensors = linear(key, out=4, inputs=4)
    down, up = tensors.values()
    torch.testing.assert_close(update.dense(NAME.replace("to_q", "point")), (up @ down)[:, :, None, None])


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_loha(rank, tmp_path):
    parts = [normal(8, rank), normal(rank, 6, seed=1), normal(8, rank, seed=2), normal(rank, 6, seed=3)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{KEY}.{name}": part for name, part in zip(names, parts, strict=True)}
    update = read_update(Net(), write(tmp_path, {**tensors, f"{KEY}.alpha": torch.tensor(3.0)}))
    wanted = (3.0 / rank) * (parts[0] @ parts[1]) * (parts[2] @ parts[3])
    torch.testing.assert_close(update.dense(NAME), wanted)


@pytest.mark.parametrize("whole", [True, False])
def test_lokr(whole, tmp_path):
    first, second, third = normal(2, 3), normal(4, 1, seed=1), normal(1, 2, seed=2)
    tensors = {f"{KEY}.lokr_w1": first, f"{KEY}.alpha": torch.tensor(0.5)}
    if whole:
        tensors[f"{KEY}.lokr_w2"] = second @ third
    else:
        tensors.update({f"{KEY}.lokr_w2_a": second, f"{KEY}.lokr_w2_b": third})
    update = read_update(Net(), write(tmp_path, tensors))
    scale = 1.0 if whole else 0.5  # LyCORIS ignores α where neither matrix is factored
    torch.testing.assert_close(update.dense(NAME), scale * torch.kron(first, second @ third))


def test_dora_and_whole_differences(tmp_path):
    base = Net()
    tensors = {**linear(alpha=2), f"{KEY}.dora_scale": torch.arange(1.0, 9.0)[:, None]}
    point = KEY.replace("to_q", "point")
    tensors |= {f"{point}.diff": normal(4, 4, 1, 1), f"{point}.diff_b": normal(4, seed=1)}
    update = read_update(base, write(tmp_path, tensors))
    weight = base.get_parameter(NAME)
    down, up = list(tensors.values())[:2]
    direction = weight + up @ down
    wanted = torch.arange(1.0, 9.0)[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight + update.dense(NAME), wanted)
    assert torch.equal(update.entries[NAME].magnitude().flatten(), torch.arange(1.0, 9.0))
    assert torch.equal(update[NAME.replace("to_q", "point")], tensors[f"{point}.diff"])
    assert torch.equal(update[NAME.replace("to_q.weight", "point.bias")], tensors[f"{point}.diff_b"])


STYLES = {
    "unet.down_blocks.0.attentions.1.to_q": ("lora_A", "lora_B"),
    "unet.down_blocks.0.attentions.1.processor.to_q_lora": ("down", "up"),
    "down_blocks.0.attentions.1.to_q": ("lora.down", "lora.up"),
    "lycoris_down_blocks_0_attentions_1_to_q": ("lora_down", "lora_up"),
    "lora_unet_input_blocks_2_1_to_q": ("lora_down", "lora_up"),
}


@pytest.mark.parametrize("key", STYLES)
def test_names_of_several_programs(key, tmp_path):
    net = Net()
    net.down_blocks[0].resnets = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    down, up = STYLES[key]
    separator = "_" if "processor" in key else "."
    tensors = linear(key, down=down, up=up)
    if separator == "_":
        tensors = {name.replace("_lora.", "_lora."): value for name, value in tensors.items()}
    assert list(read_update(net, write(tmp_path, tensors))) == [NAME]


def test_the_folder_that_diffusers_writes(tmp_path):
    key = "unet.down_blocks.0.attentions.1.to_q"
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.alpha_pattern": {}}
    path = write(
        tmp_path, linear(key, down="lora_A", up="lora_B"), lora_adapter_metadata=json.dumps(settings)
    )
    path.rename(tmp_path / "pytorch_lora_weights.safetensors")
    update = read_update(Net(), tmp_path)
    down, up = linear().values()
    torch.testing.assert_close(update.dense(NAME), 6 / math.sqrt(2) * up @ down)


def test_parts_of_a_pipeline(tmp_path):
    base = Weights.joined(
        {"unet": Weights.of(Net()), "text_encoder": Weights.of(nn.ModuleDict({"to_q": nn.Linear(6, 8)}))},
        source="a pipeline",
    )
    tensors = {**linear(), **linear("lora_te_text_model_to_q")}
    assert list(read_update(base, write(tmp_path, tensors))) == [f"unet.{NAME}", "text_encoder.to_q.weight"]


def test_without_a_base_dots_are_put_back(tmp_path):
    update = read_update(None, write(tmp_path, linear(alpha=2)))
    assert list(update) == [f"unet.{NAME}"] and "guessed" in update.source
    assert update.entries[f"unet.{NAME}"].shape == (8, 6)
    names = {
        "lora_te_text_model_encoder_layers_11_self_attn_out_proj":
            "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj":
            "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_up_blocks_3_resnets_2_time_emb_proj": "unet.up_blocks.3.resnets.2.time_emb_proj",
        "lora_unet_double_blocks_3_img_attn_qkv": "unet.double_blocks.3.img_attn.qkv",
    }  # fmt: skip
    assert {key: guessed_path(key) for key in names} == names


# As diffusers 0.42 converts an SDXL checkpoint. All of its 852 names were compared once, and those of SD 1.5.
SDXL = {
    "input_blocks_4_1_transformer_blocks_0_norm1": "down_blocks_1_attentions_0_transformer_blocks_0_norm1",
    "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_5_0_emb_layers_1": "down_blocks_1_resnets_1_time_emb_proj",
    "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block_attentions_0_transformer_blocks_9_ff_net_2",
    "middle_block_2_in_layers_2": "mid_block_resnets_1_conv1",
    "output_blocks_0_1_proj_out": "up_blocks_0_attentions_0_proj_out",
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_8_0_skip_connection": "up_blocks_2_resnets_2_conv_shortcut",
    "label_emb_0_2": "add_embedding_linear_2",
    "down_blocks_1_attentions_0_proj_in": "down_blocks_1_attentions_0_proj_in",
}


@pytest.mark.parametrize("old", SDXL)
def test_names_of_the_original_unet(old):
    assert diffusers_name(old, 2) == SDXL[old]


def test_what_does_not_fit_is_listed(tmp_path):
    def refuse(tensors, message):
        with pytest.raises(UpdateError, match=message):
            read_update(Net(), write(tmp_path, tensors))

    refuse({**linear(), **linear("lora_unet_nowhere")}, "no module for lora_unet_nowhere")
    refuse(linear(out=9), r"to_q\.weight has shape \(8, 6\)")
    refuse(linear(alpha=0), "alpha is 0")
    refuse({f"{KEY}.lora_down.weight": normal(2, 6)}, "down or up factor is missing")
    refuse({**linear(), f"{KEY}.oft_blocks": normal(2)}, r"1 keys are of no kind .*oft_blocks")
    refuse(linear("lora_unet_to_q"), "several modules may be meant")
    refuse({**linear(), **linear(NAME.removesuffix(".weight"))}, "several names mean")
    refuse(linear(f"base_model.model.{NAME}", down="lora_A", up="lora_B"), "adapter_config.json")
    refuse({**linear(), f"{KEY}.dora_scale": normal(1, 6)}, "dora_scale has shape")
    refuse({**linear(), f"{KEY}.alpha": torch.ones(2)}, "one number")
    refuse(linear(rank=0), "rank 0")
    broken = linear()
    broken[f"{KEY}.lora_up.weight"][0, 0] = float("nan")
    update = read_update(Net(), write(tmp_path, broken))
    with pytest.raises(UpdateError, match=r"lora_up\.weight has NaN"):
        update[NAME]
