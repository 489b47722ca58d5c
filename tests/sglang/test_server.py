"""The real server over HTTP, started as the documentation says."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from ep_backends.shared.pictures import read_picture
from ep_core import demo

from ..servers import counters, post  # noqa: TID252 # tests are no installed package

SAMPLES = json.loads((demo.PICTURES / "samples.json").read_text())
START_SECONDS = 150


@contextmanager
def serve(folder, *arguments, policy):
    """`entropyprune serve sglang`, until the block ends; gives the address and the log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        *(sys.executable, "-m", "entropyprune", "serve", "sglang", "--policy", policy, "--"),
        *("--model-path", str(demo.MODEL), "--device", "cpu", "--dtype", "float32"),
        *("--mm-attention-backend", "sdpa", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", "--disable-cuda-graph", "--max-total-tokens", "8192"),
        *("--context-length", "2048", "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-metrics", *arguments),
    ]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, log)
        yield address, log
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its own session: nothing else is in that group
        server.wait(30)


def wait_for(address, server, log):
    end = time.monotonic() + START_SECONDS
    while "ready to roll" not in log.read_text():
        if server.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)


def picture_url(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(address, picture, question, **more):
    """One OpenAI chat request about a picture."""
    content = [
        {"type": "image_url", "image_url": {"url": picture_url(picture)}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": "demo",
        "temperature": 0,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": content}],
    }
    return post(f"{address}/v1/chat/completions", body | more)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # 100 of the 144 tokens of a demonstration picture; pictures of 64 tokens are too small for it
    with serve(folder, policy="layer=2,keep=100,method=set-entropy") as (address, log):
        yield address, log


def test_answers_of_a_pruned_server(server):
    address, _ = server
    asked = right = 0
    for sample in SAMPLES[:4]:
        picture = read_picture(demo.PICTURES / sample["image"])
        for question in sample["questions"]:
            status, answer = ask(address, picture, question["question"])
            assert status == 200, answer
            asked += 1
            right += answer["choices"][0]["message"]["content"].strip() == question["answer"]
    assert right >= 0.8 * asked, f"{right} of {asked} answers are right"


def test_counters_say_what_was_kept(server):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    before = counters(address)
    ask(address, picture, "what number is written?")
    ask(address, picture, "what number is written?", custom_params={"entropyprune": {"keep": 16}})
    ask(address, picture, "what number is written?", custom_params={"entropyprune": "off"})
    after = counters(address)

    def change(name, reason=""):
        return after.get((name, reason), 0) - before.get((name, reason), 0)

    assert change("visual_tokens_seen_total") == 3 * 144
    assert change("visual_tokens_kept_total") == 100 + 16 + 144
    assert change("requests_pruned_total") == 2
    assert change("requests_unpruned_total", "switched off by the request") == 1


def test_picture_too_small_for_the_servers_budget_stays_whole(server):
    address, _ = server
    small = read_picture(demo.PICTURES / SAMPLES[0]["image"]).resize((224, 224))
    before = counters(address)
    status, answer = ask(address, small, "what number is written?")
    assert status == 200, answer
    reason = ("requests_unpruned_total", "the server's budget does not fit the picture")
    assert counters(address)[reason] == before.get(reason, 0) + 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep": 1.6}, "keep=1.6 is outside"),
        ({"keep": 145}, "keep=145 asks for more than a span of 144 tokens has"),
        ({"layer": 1}, "a request cannot set 'layer', only keep, average and details"),
        ({"flops": 0.5}, "a request cannot set 'flops'"),
        ({"keep": 5, "details": "yes"}, "details='yes' is not allowed"),
        ("of", "entropyprune='of' cannot be read"),
    ],
)
def test_request_that_asks_for_nonsense_fails_alone(server, asked, message):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    question = "what number is written?"
    status, answer = ask(address, picture, question, custom_params={"entropyprune": asked})
    assert status == 400
    assert message in answer["message"]
    status, answer = ask(address, picture, question)
    assert status == 200, "the server did not survive a bad request"


def test_native_endpoint_says_what_was_kept(server):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what number is written?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    sampling = {"temperature": 0, "max_new_tokens": 4}
    body = {"text": prompt, "image_data": picture_url(picture), "sampling_params": sampling}
    _, answer = post(f"{address}/generate", body)
    assert answer["meta_info"]["entropyprune"] == [{"visual_tokens": 144, "kept": 100}]
    sampling["custom_params"] = {"entropyprune": {"keep": 7, "details": True}}
    _, answer = post(f"{address}/generate", body)
    (info,) = answer["meta_info"]["entropyprune"]
    (span,) = info["spans"]
    assert len(span["kept"]) == info["kept"] == 7
    prompt_tokens = answer["meta_info"]["prompt_tokens"]
    assert info["kv"] == {"below": prompt_tokens, "from": prompt_tokens - 144 + 7}


def test_streamed_answer_says_it_once(server):
    address, _ = server
    picture = read_picture(demo.PICTURES / SAMPLES[0]["image"])
    body = {
        "text": "<|vision_start|><|image_pad|><|vision_end|>what number is written?",
        "image_data": picture_url(picture),
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        "stream": True,
    }
    request = urllib.request.Request(
        f"{address}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line[6:] for line in response.read().decode().splitlines() if "data: {" in line]
    last = json.loads(lines[-1])["meta_info"]
    assert last["entropyprune"] == [{"visual_tokens": 144, "kept": 100}]


def test_log_names_no_leak(server):
    _, log = server
    assert "leak" not in log.read_text().lower()
