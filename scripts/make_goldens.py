"""Makes the golden models under tests/goldens: tiny random checkpoints and their logits.

Needs torch and transformers, which kvc_jax itself does not: run it in an environment
of its own, made with `pip install torch transformers`. For each model it writes a
folder with `config.json` and `model.safetensors`, as transformers saves them, and
`golden.safetensors` with input_ids i32 [T] and logits f32 [T, V].

Weights are drawn wide (and norm weights away from 1, biases away from 0), so that
logits are of order 1 to 10 and a mistake anywhere shows in them. A seed follows from
the model's name, so that adding a model does not change the others.
"""

import argparse
import pathlib
import tempfile
import zlib

import torch
import transformers
from safetensors.torch import save

NUM_TOKENS = 48  # past the original_max_position_embeddings of the scaled models
MAX_BYTES = 150_000

_BASE = {
    "vocab_size": 65, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}


def _rope(kind: str, theta: float, **numbers: float) -> dict:
  return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


# Llama 3 scaling keeps frequencies of wavelength < original / high, divides those > original / low
# and blends between. "llama31" has all three sorts, "llama32" the last two.
MODELS = {
    "llama2": {"num_key_value_heads": 4},
    "llama3": _rope("default", 500_000.0),
    "llama31": {"hidden_size": 24, "head_dim": 32, "intermediate_size": 40, **_rope(
        "llama3", 500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32)},
    "llama32_tied": {"tie_word_embeddings": True, "head_dim": 16, **_rope(
        "llama3", 500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16)},
    "mistral": {"architecture": "mistral", "sliding_window": None, **_rope("default", 1_000_000.0)},
    "mqa": {"num_key_value_heads": 1},
    "head_dim_10": {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10},
    "head_dim_80": {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80,
                    "intermediate_size": 40},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": _rope("linear", 10_000.0, factor=4.0),
    "eps": {"num_hidden_layers": 3, "hidden_size": 24, "rms_norm_eps": 0.05},
}


def make_model(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
  """The model called `name`, its weights drawn anew, and input ids [1, T]."""
  options = {**_BASE, **MODELS[name]}
  architecture = options.pop("architecture", "llama")
  config_class, model_class = {
      "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
      "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
  }[architecture]
  model = model_class(config_class(**options)).float().eval()
  generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
  with torch.no_grad():
    for key, parameter in sorted(model.named_parameters()):
      noise = torch.randn(parameter.shape, generator=generator)
      if "norm" in key:
        parameter.copy_(1 + 0.3 * noise)
      else:
        parameter.copy_(0.25 * noise)
  ids = torch.randint(0, options["vocab_size"], (1, NUM_TOKENS), generator=generator)
  return model, ids


def write_golden(name: str, folder: pathlib.Path) -> str:
  """Writes one model and its logits to `folder`. Returns its row of the table."""
  model, ids = make_model(name)
  with torch.no_grad():
    logits = model(ids).logits[0].float().contiguous()
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as scratch:
    model.save_pretrained(scratch)
    for file in ("config.json", "model.safetensors"):
      (folder / file).write_bytes((pathlib.Path(scratch) / file).read_bytes())
  # One entry: safetensors writes several in an order that differs from run to run.
  metadata = {"made_with": f"torch {torch.__version__}, transformers {transformers.__version__}"}
  golden = {"input_ids": ids[0].to(torch.int32), "logits": logits}
  (folder / "golden.safetensors").write_bytes(save(golden, metadata))
  size = (folder / "model.safetensors").stat().st_size
  if size > MAX_BYTES:
    raise SystemExit(f"{name}: model.safetensors is {size} bytes; make the model smaller than {MAX_BYTES}")
  parameters = sum(p.numel() for p in model.parameters())
  rms, largest = logits.square().mean().sqrt(), logits.abs().max()
  return f"{name:14}{parameters:>12,}{size:>10,}{rms:>12.2f}{largest:>12.2f}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  default = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens"
  parser.add_argument("--out", type=pathlib.Path, default=default, help="folder to write to (tests/goldens)")
  parser.add_argument("--only", nargs="*", choices=MODELS, help="models to make (all)")
  args = parser.parse_args()
  torch.set_num_threads(1)  # many times faster on models this small
  transformers.utils.logging.disable_progress_bar()
  print(f"{'model':14}{'parameters':>12}{'bytes':>10}{'logits rms':>12}{'largest':>12}")
  for name in args.only or MODELS:
    print(write_golden(name, args.out / name))


if __name__ == "__main__":
  main()
