"""The `kvc` command as a user meets it: results, and one clear line on each kind of bad input."""

import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvc_jax import LLM, CacheConfig, Compression, FullAttention, InputError, SamplingParams, WindowAttention
from kvc_jax.cli import main

STORIES = pathlib.Path(__file__).parents[1] / "assets" / "stories260K"
EXPECTED = (STORIES / "expected_200_steps.txt").read_text(encoding="utf-8")
SHAPE = ["--block-size", "2", "--max-num-seqs", "2", "--chunk-size", "32"]  # of one shape, compiled once
GENERATE = ["generate", str(STORIES), "--prompt", "Once", "--max-tokens", "4"]


def test_generate_prints_the_text_and_a_receipt(capsys):
  assert main(["generate", str(STORIES), "--prompt", "", "--max-tokens", "40", *SHAPE]) == 0
  out, err = capsys.readouterr()
  assert EXPECTED.startswith(out.removesuffix("\n"))
  assert len(out) > 60
  assert "blocks 400 of 400" in err


def test_generate_json_of_two_prompts(capsys, tmp_path):
  (tmp_path / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
  command = ["generate", str(STORIES), "--prompt", "The dog", "--file", str(tmp_path / "prompt.txt"), "--json"]
  assert main([*command, "--rate", "4", "--interval", "4", "--window", "4", *SHAPE]) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  first, second = sorted(lines, key=lambda line: line["index"])
  assert [first["index"], second["index"]] == [0, 1]
  receipt = second["receipt"]
  assert receipt["rate_asked"] == 4
  assert 2 < receipt["rate_reached"] <= 4
  assert np.shape(receipt["kvs_kept"]) == (5, 4)
  assert receipt["bytes_held"] == receipt["blocks_held"] * receipt["bytes_per_block"]
  assert receipt["kvs_seen"] == receipt["tokens_seen"] * 20


def test_samples_with_log_probabilities(capsys):
  command = [*GENERATE, "--temperature", "1", "--seed", "5", *SHAPE]
  assert main([*command, "--n", "2", "--json", "--logprobs", "3"]) == 0
  lines = sorted((json.loads(line) for line in capsys.readouterr().out.splitlines()), key=lambda line: line["sample"])
  assert [line["sample"] for line in lines] == [0, 1]
  for line in lines:
    assert [token["token_id"] for token in line["logprobs"]] == line["token_ids"]
    for token in line["logprobs"]:
      best = [logprob for _, logprob in token["top"]]
      assert len(best) == 3
      assert best == sorted(best, reverse=True)
      assert token["logprob"] <= best[0] <= 0
  assert main([*command, "--n", "2", "--quiet"]) == 0
  assert "--- prompt 0, sample 1 ---" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"], ["eval", "recall", "--help"]])
def test_help_comes_without_jax(command):
  code = ("import sys; sys.modules['jax'] = None; from kvc_jax.cli import main; "  # an import of it raises
          "sys.exit(main(sys.argv[1:]))")
  done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("usage: kvc")


def test_kept_positions_stay(capsys):
  prompt = "Once upon a time there was a dog. " * 6
  command = ["generate", str(STORIES), "--prompt", prompt, "--json", *SHAPE]
  options = ["--rate", "8", "--window", "2", "--keep", "3:9", "--keep", "20:24", "--max-tokens", "2"]
  assert main([*command, *options]) == 0
  receipt = json.loads(capsys.readouterr().out)["receipt"]
  assert np.min(receipt["kvs_kept"]) >= 10


@pytest.mark.parametrize("extra", [[], ["--file", "-"]])
def test_prompt_from_standard_input(extra, capsys, monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon a time")))
  assert main(["generate", str(STORIES), "--max-tokens", "8", "--quiet", *extra]) == 0
  assert capsys.readouterr().out.startswith(", there was")


def test_inspect_draws_a_png(capsys, tmp_path):
  picture = tmp_path / "kept.png"
  command = ["inspect", str(STORIES), "--prompt", "Once upon a time " * 20, "--rate", "4", "--max-tokens", "2"]
  assert main([*command, "--scoring", "full", "--buffer", "2", *SHAPE, "-o", str(picture)]) == 0
  assert picture.read_bytes().startswith(b"\x89PNG")
  assert "layer   4:" in capsys.readouterr().out


def test_convert_then_generate(capsys, tmp_path):
  target = str(tmp_path / "converted")
  assert main(["convert", str(STORIES), target]) == 0
  capsys.readouterr()
  texts = []
  for model in (str(STORIES), target):
    assert main(["generate", model, "--prompt", "Once", "--max-tokens", "12", "--quiet", *SHAPE]) == 0
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1]


def test_demo_finds_the_fact_at_every_rate(capsys, tmp_path):
  picture = tmp_path / "heatmap.png"
  assert main(["demo", "--length", "1024", "--quiet", "--heatmap", str(picture)]) == 0
  lines = capsys.readouterr().out.splitlines()
  value = re.search(r" (\d{4})\.$", lines[1])[1]
  answers = [line.split()[-2:] for line in lines if re.match(r" +\d+x ", line)]
  assert answers == [[value, "right"]] * 4
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_tells_the_reference_story(capsys, tmp_path):
  picture = tmp_path / "heatmap.png"
  assert main(["demo", "--story", "--heatmap", str(picture)]) == 0
  out = capsys.readouterr().out
  assert EXPECTED in out
  assert "equals the reference text: yes" in out
  assert picture.read_bytes().startswith(b"\x89PNG")


# --- Bad input: the command ---------------------------------------------------------------


def _damaged(tmp_path, damage):
  """A copy of the shipped model that `damage` has changed."""
  folder = tmp_path / "model"
  shutil.copytree(STORIES, folder)
  damage(folder)
  return ["generate", str(folder), "--prompt", "Once", "--max-tokens", "4"]


def _config(**fields):
  def damage(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")

  return damage


def _weights(change):
  def damage(folder):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")

  return damage


def _truncate(folder):
  data = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _write(name, text):
  return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def _remove(*names):
  return lambda folder: [(folder / name).unlink() for name in names]


NORM = "model.norm.weight"
DAMAGES = {
    "no config": (_remove("config.json"), "config.json is missing"),
    "config not JSON": (_write("config.json", "{"), "not valid JSON"),
    "config no object": (_write("config.json", "[]"), "no JSON object"),
    "unknown architecture": (_config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "unknown RoPE": (_config(rope_parameters={"rope_type": "yarn"}), "yarn"),
    "RoPE lacks a number": (_config(rope_parameters={"rope_type": "llama3", "factor": 8}), "lacks"),
    "sliding window": (_config(sliding_window=128), "sliding window of 128"),
    "Mistral's own sliding window": (_config(architectures=["MistralForCausalLM"]), "sliding window of 4096"),
    "RoPE base of 0": (_config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta is 0"),
    "partial rotation": (_config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "no norm epsilon": (_config(rms_norm_eps=float("nan")), "rms_norm_eps"),
    "quantised": (_config(quantization_config={"bits": 4}), "quantised"),
    "unknown activation": (_config(hidden_act="gelu"), "gelu"),
    "heads do not divide": (_config(num_key_value_heads=3), "not a multiple"),
    "layers missing": (_config(num_hidden_layers=None), "num_hidden_layers"),
    "config wants another shape": (_config(intermediate_size=64), "mlp"),
    "config wants more layers": (_config(num_hidden_layers=6), "layers.5"),
    "no weights": (_remove("model.safetensors"), "safetensors"),
    "truncated weights": (_truncate, "model.safetensors"),
    "weights are no safetensors": (_write("model.safetensors", "hello, world"), "model.safetensors"),
    "missing key": (_weights(lambda t: t.pop(NORM)), NORM),
    "unknown key": (_weights(lambda t: t.update(extra=np.zeros(3, np.float32))), "extra"),
    "wrong shape": (_weights(lambda t: t.update({NORM: np.zeros(3, np.float32)})), NORM),
    "wrong dtype": (_weights(lambda t: t.update({NORM: np.zeros(64, np.int32)})), NORM),
    "no tokenizer": (_remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "unreadable tokenizer": (_write("tokenizer.json", "{]"), "tokenizer"),
    "index names a missing shard": (
        lambda f: [_remove("model.safetensors")(f),
                   _write("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "a.safetensors"}}')(f)],
        "a.safetensors"),
}

OPTIONS = {
    "rate below 1": (["--rate", "0.5"], "at least 1"),
    "rate not a number": (["--rate", "nan"], "at least 1"),
    "rate no number": (["--rate", "eight"], "invalid float value"),
    "window above the budget": (["--max-cache-tokens", "16", "--window", "32"], "below window + sinks"),
    "window of 0": (["--rate", "2", "--window", "0"], "window is 0"),
    "negative sinks": (["--rate", "2", "--sinks", "-1"], "sinks is -1"),
    "interval of 0": (["--rate", "2", "--interval", "0"], "interval is 0"),
    "unknown allocation": (["--allocation", "heads"], "invalid choice"),
    "unknown scoring": (["--scoring", "best"], "invalid choice"),
    "option of another scoring": (["--rate", "2", "--scoring", "full", "--pooling", "7"], "--pooling does not go with"),
    "mass above 1": (["--mass", "2"], "mass is 2"),
    "mass without scores": (["--mass", "0.9", "--scoring", "key-norm"], "KeyNorm keeps none"),
    "safeguard above 1": (["--rate", "2", "--safeguard", "1.5"], "safeguard is 1.5"),
    "safeguard for heads alone": (["--rate", "2", "--safeguard", "0.2", "--allocation", "head"], "heads compete"),
    "expected attention, twice": (["--rate", "2", "--scoring", "expected", "--interval", "4"], "prompts alone"),
    "profile without a file": (["--rate", "2", "--allocation", "profile"], "give --head-profile"),
    "bias without a file": (["--rate", "2", "--head-bias", "1"], "give --head-profile"),
    "missing profile": (["--rate", "2", "--head-profile", "no.safetensors"], "no.safetensors is missing"),
    "profile without a budget": (["--head-profile", "no.safetensors"], "compresses nothing"),
    "range of letters": (["--rate", "2", "--keep", "a"], "'a' is no range"),
    "range that ends before it starts": (["--rate", "2", "--keep", "3:1"], "end of a range to keep is 1"),
    "range without a budget": (["--keep", "0:2"], "compresses nothing"),
    "prefill interval of 0": (["--rate", "2", "--prefill-interval", "0"], "prefill_interval is 0"),
    "no samples": (["--n", "0"], "n is 0"),
    "log-probabilities of a text": (["--logprobs", "1"], "without --json"),
    "observe none": (["--rate", "2", "--decode-every", "0"], "decode_every is 0"),
    "power of 3": (["--rate", "2", "--power", "3"], "power is 3"),
    "even pooling": (["--rate", "2", "--pooling", "4"], "odd width"),
    "no observed queries": (["--rate", "2", "--queries", "0"], "queries is 0"),
    "negative buffer": (["--rate", "2", "--buffer", "-1"], "buffer is -1"),
    "block size of 12": (["--block-size", "12"], "power of two"),
    "chunk size of 0": (["--chunk-size", "0"], "chunk_size is 0"),
    "pool too small for a sequence": (["--num-blocks", "20"], "num_blocks"),
    "pool of too few bytes": (["--kv-cache-memory-bytes", "1000"], "kv_cache_memory_bytes"),
    "pool too small for the prompt": (["--num-blocks", "30", "--prompt", "Once " * 40], "prompt 1 needs"),
    "pool of too many blocks": (["--num-blocks", "2000000000"], "2**30"),
    "pool above the memory": (["--num-blocks", "8000000", "--block-size", "128"], "but the device has"),
    "prompt longer than the model": (["--prompt", "Once upon a time " * 200], "prompt 1 has"),
    "context above the model's": (["--max-model-len", "4096"], "max_model_len is 4096"),
    "no tokens to generate": (["--max-tokens", "0"], "max_tokens is 0"),
    "negative temperature": (["--temperature", "-1"], "temperature is -1"),
    "top-p of 0": (["--top-p", "0"], "top_p is 0"),
    "top-k above 32 bits": (["--top-k", "99999999999"], "top_k is 99999999999"),
    "window above 32 bits": (["--rate", "2", "--window", "99999999999"], "window is 99999999999"),
    "buffer above 32 bits": (["--rate", "2", "--scoring", "full", "--buffer", "3000000000"], "buffer is 3000000000"),
    "too many queries": (["--rate", "2", "--queries", "20000000"], "queries is 20000000"),
    "tables above the memory": (["--max-num-seqs", "100000000"], "max_num_seqs"),
    "compression without a budget": (["--interval", "4"], "without --rate, --max-cache-tokens or --mass"),
    "scoring without a budget": (["--scoring", "full"], "without --rate, --max-cache-tokens or --mass"),
    "top-k of -2": (["--top-k", "-2"], "top_k is -2"),
    "min-p of 2": (["--min-p", "2"], "min_p is 2"),
    "negative seed": (["--seed", "-3"], "seed is -3"),
    "empty stop string": (["--stop", ""], "empty stop string"),
    "missing prompt file": (["--file", "no-such-file.txt"], "no-such-file.txt is missing"),
    "prompt file is a folder": (["--file", "."], "directory"),
    "no chat template": (["--chat"], "chat template"),
    "unknown option": (["--speed", "9"], "unrecognized arguments"),
}


def _fails(command, message, capsys):
  """The command ends with 2 and one line that has `message` in it."""
  try:
    status = main(command)
  except SystemExit as e:
    status = e.code
  _, err = capsys.readouterr()
  assert status == 2
  assert len(err.strip().splitlines()) == 1, err
  assert "error: " in err
  assert message in err


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_model(kind, capsys, tmp_path):
  damage, message = DAMAGES[kind]
  _fails(_damaged(tmp_path, damage), message, capsys)


@pytest.mark.parametrize("kind", OPTIONS)
def test_bad_option(kind, capsys):
  options, message = OPTIONS[kind]
  _fails([*GENERATE, *options], message, capsys)


@pytest.mark.parametrize(("command", "message"), [
    ([], "required: COMMAND"),
    (["compress"], "invalid choice"),
    (["generate"], "required: MODEL"),
    (["generate", "no-such-model", "-p", "a"], "no-such-model"),
    (["convert", "no-such-model", "somewhere"], "no-such-model"),
    (["convert", str(STORIES), str(STORIES)], "stories260K"),
    (["inspect", str(STORIES), "-p", "a", "-p", "b"], "one prompt"),
    (["inspect", str(STORIES), "-p", "a", "--max-tokens", "1", "-o", "no-such-folder/a.png"], "no-such-folder/a.png"),
    (["demo", "--heatmap", "no-such-folder/a.png"], "no-such-folder/a.png"),
    (["demo", "--length", "0"], "length is 0"),
    (["demo", "--length", "8193"], "at most"),
])
def test_bad_command(command, message, capsys):
  _fails(command, message, capsys)


def test_prompt_file_that_is_not_text(capsys, tmp_path):
  (tmp_path / "prompt").write_bytes(b"\xff\xfe\x00")
  _fails([*GENERATE, "--file", str(tmp_path / "prompt")], "not UTF-8", capsys)


def test_corrupted_checkpoint(capsys, tmp_path):
  target = tmp_path / "converted"
  assert main(["convert", str(STORIES), str(target)]) == 0
  capsys.readouterr()
  files = [f for f in (target / "params").rglob("*") if f.is_file() and f.stat().st_size > 10_000]
  files[0].write_bytes(files[0].read_bytes()[:5000])
  _fails(["generate", str(target), "-p", "a"], "params", capsys)


def test_converting_twice_needs_overwrite(capsys, tmp_path):
  command = ["convert", str(STORIES), str(tmp_path / "converted")]
  assert main(command) == 0
  capsys.readouterr()
  _fails(command, "converted", capsys)
  assert main([*command, "--overwrite"]) == 0


def test_a_closed_pipe_is_no_traceback():
  """`kvc generate ... | head` ends quietly."""
  options = " ".join(["--max-tokens", "200", "--quiet", *SHAPE])
  command = f"{sys.executable} -m kvc_jax.cli generate {STORIES} -p Once {options} | head -c 5"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
  assert len(done.stdout) == 5
  assert "Traceback" not in done.stderr


# --- Bad input: the library ----------------------------------------------------------------


ODD = {"observed": "sometimes", "queries": 0, "power": 2, "buffer": 0, "pooling": 1, "decode_every": 1,
       "value": lambda self, kvs: 0}


@pytest.fixture(scope="module")
def llm():
  return LLM(STORIES, max_num_seqs=1, block_size=8)


@pytest.mark.parametrize(("prompts", "params", "message"), [
    ([[1, 512]], None, "token id 512 is outside"),
    ([[-1]], None, "token id -1 is outside"),
    ([[]], None, "prompt 0 has no tokens"),
    (None, None, "prompts is None"),
    (b"abc", None, "prompts is b'abc'"),
    ([b"abc"], None, "prompt 0 is bytes"),
    ("a", {"temperature": 0}, "must be SamplingParams"),
    (["a", [1.5]], None, "prompt 1 is neither a text nor a list of token ids"),
    (["a", None], None, "prompt 1 is neither a text nor a list of token ids"),
    (["a", "b"], [SamplingParams()], "2 prompts but 1 SamplingParams"),
    (["a", [1] * 600], None, "prompt 1 has 600 tokens"),
])
def test_bad_generate_call(llm, prompts, params, message):
  with pytest.raises(InputError, match=message):
    llm.generate(prompts, params)
  assert llm.free_blocks == llm.config.num_blocks - 1


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Compression(), "give a rate or max_cache_tokens"),
    (lambda: Compression(rate=float("inf")), "at least 1"),
    (lambda: Compression(rate=2, allocation="none"), "allocation is 'none'"),
    (lambda: Compression(rate=2, scoring="window"), "no scoring rule"),
    (lambda: Compression(rate=2, scoring=FullAttention), "no scoring rule"),
    (lambda: FullAttention(reduction="median"), "'sum' or 'mean'"),
    (lambda: WindowAttention(power=0), "from 1 to 2"),
    (lambda: WindowAttention(queries=2.5), "queries is 2.5"),
    (lambda: Compression(rate="8"), "rate is '8'"),
    (lambda: Compression(rate=2, window=4.5), "window is 4.5"),
    (lambda: Compression(rate=2, scoring=dataclasses.make_dataclass("Odd", [], namespace=ODD)()), "no scoring rule"),
    (lambda: Compression(rate=2, keep=3), "keep is 3; give a list of .start, end. pairs"),
    (lambda: Compression(rate=2, keep=[(1, 2, 3)]), "pairs"),
    (lambda: Compression(rate=2, keep=[(4, 4)]), "end of a range to keep is 4"),
    (lambda: Compression(rate=2, keep=[(0, 1)] * 9), "9 ranges; give 8 at most"),
    (lambda: Compression(rate=2, prefill_interval=0), "prefill_interval is 0"),
    (lambda: Compression(rate=2, on_demand=1), "on_demand is 1; give True or False"),
    (lambda: SamplingParams(n=0), "n is 0"),
    (lambda: SamplingParams(logprobs=21), "logprobs is 21"),
    (lambda: SamplingParams(stop=None), "stop is None"),
    (lambda: SamplingParams(stop_token_ids=2), "stop_token_ids is 2"),
    (lambda: SamplingParams(temperature="0.5"), "temperature is '0.5'"),
    (lambda: SamplingParams(max_tokens=2.5), "max_tokens is 2.5"),
    (lambda: CacheConfig(num_layers=0, num_slots=1, num_kv_heads=1, head_dim=8, num_blocks=9, max_blocks_per_head=2),
     "num_layers is 0"),
    (lambda: CacheConfig(num_layers=1, num_slots=1, num_kv_heads=1, head_dim=8, num_blocks=1, max_blocks_per_head=2),
     "at least 2"),
])
def test_bad_settings(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_chat_needs_a_template(llm):
  with pytest.raises(InputError, match="chat template"):
    llm.chat([{"role": "user", "content": "Hello"}])
