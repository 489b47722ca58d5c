"""The real server over HTTP, started as the documentation says."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ep_backends.shared.pictures import read_picture
from ep_core import demo
from ep_core.checkpoint import read_config

from ..servers import counters, post  # noqa: TID252 # tests are no installed package

SAMPLES = json.loads((demo.PICTURES / "samples.json").read_text())
START_SECONDS, STARTS = 600, 8
NUMBER = "what number is written?"
API_SERVER = [
    *("serve", "api_server", str(demo.MODEL), "--backend", "pytorch", "--eager-mode"),
    *("--cache-block-seq-len", "16", "--num-gpu-blocks", "128", "--max-batch-size", "8"),
    *("--logprobs-mode", "raw_logprobs"),
]
OVERRIDES = {"entropyprune": {"layer": 2, "keep": 36, "method": "set-entropy"}}


@contextmanager
def serve(folder, *command):
    """A server's command line, until the block ends; gives its address."""
    log = folder / "server.log"
    for _ in range(STARTS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = ("--server-name", "127.0.0.1", "--server-port", str(port))
        with log.open("w") as out:
            server = subprocess.Popen(
                [sys.executable, "-m", *command, *where],
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, "ENTROPYPRUNE": "", "OMP_NUM_THREADS": "1"},
            )
        address = f"http://127.0.0.1:{port}"
        try:
            if not answers(address, server):
                # LMDeploy's two processes meet through a third, which one of them may end too soon
                assert "RPCServerDeadError" in log.read_text(), log.read_text()[-3000:]
                continue
            yield address
            return
        finally:
            stop(server)
    pytest.fail(f"LMDeploy did not start its engine in {STARTS} attempts")


def stop(server):
    """End a server and its engine, which are a group of processes of their own."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(10)


def answers(address, server):
    """Does the server come up? False when its process ended."""
    end = time.monotonic() + START_SECONDS
    while server.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return True
        assert time.monotonic() < end, f"the server did not start in {START_SECONDS} s"
        time.sleep(0.3)
    return False


def part(sample, wish=None, inside=False):
    """A picture as a part of a message, and what it asks of pruning."""
    buffer = io.BytesIO()
    read_picture(demo.PICTURES / sample["image"]).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    own = {} if wish is None else {"entropyprune": wish}
    if inside:
        return {"type": "image_url", "image_url": {"url": url} | own}
    return {"type": "image_url", "image_url": {"url": url}} | own


def body_of(*content, **more):
    """An OpenAI chat request; a text stands for a part with it."""
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    return {
        "model": str(demo.MODEL),
        "temperature": 0,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": parts}],
    } | more


def ask(address, *content, **more):
    return post(f"{address}/v1/chat/completions", body_of(*content, **more))


def text_of(answer):
    return answer["choices"][0]["message"]["content"].strip()


@contextmanager
def counted(address, **expected):
    """What is counted inside, by name; a reason stands in the place of `unpruned`."""
    before = counters(address)
    yield
    after = counters(address)
    changed = {
        reason or name.removesuffix("_total"): int(value - before.get((name, reason), 0))
        for (name, reason), value in after.items()
        if value != before.get((name, reason), 0)
    }
    assert changed == expected


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # 100 of the 144 tokens of a demonstration picture
    policy = "layer=2,keep=100,method=set-entropy"
    command = ("entropyprune", "serve", "lmdeploy", "--policy", policy, "--", *API_SERVER)
    with serve(folder, *command) as address:
        yield address


def test_answers_of_a_pruned_server(server):
    asked = right = 0
    for sample in SAMPLES[:4]:
        for question in sample["questions"]:
            status, answer = ask(server, part(sample), question["question"])
            assert status == 200, answer
            asked += 1
            right += text_of(answer) == question["answer"]
    assert right >= 0.8 * asked, f"{right} of {asked} answers are right"


def test_a_streamed_answer_is_the_same(server):
    content = (part(SAMPLES[0]), NUMBER)
    _, whole = ask(server, *content)
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps(body_of(*content, stream=True)).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line[6:] for line in response.read().decode().splitlines() if "data: {" in line]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
    assert "".join(pieces).strip() == text_of(whole)


def test_text_only_is_not_counted(server):
    with counted(server):
        status, answer = ask(server, "is there a red star?")
    assert status == 200, answer


@pytest.mark.parametrize("inside", [False, True], ids=["beside the picture", "in its image_url"])
def test_counters_say_what_each_picture_kept(server, inside):
    seen = {"visual_tokens_seen": 144, "requests_pruned": 1}
    one = SAMPLES[0]
    with counted(server, visual_tokens_kept=100, **seen):
        ask(server, part(one), NUMBER)
    with counted(server, visual_tokens_kept=16, **seen):
        ask(server, part(one, {"keep": 16}, inside), NUMBER)
    off = {"switched off by the request": 1}
    with counted(server, visual_tokens_seen=144, visual_tokens_kept=144, **off):
        ask(server, part(one, "off", inside), NUMBER)
    three = [part(one, wish, inside) for wish in ("off", None, {"keep": 0.25})]
    kept = 144 + 100 + 36
    with counted(server, visual_tokens_seen=432, visual_tokens_kept=kept, requests_pruned=1):
        status, answer = ask(server, *three, NUMBER)
    assert status == 200, answer


def test_a_picture_that_the_budget_does_not_fit_stays_whole_beside_one_that_it_fits(server):
    """The server keeps 100 tokens of a picture, and this one has 64."""
    buffer = io.BytesIO()
    read_picture(demo.PICTURES / SAMPLES[1]["image"]).resize((112, 112)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    small, large = {"type": "image_url", "image_url": {"url": url}}, part(SAMPLES[0])
    kept = {"visual_tokens_seen": 208, "visual_tokens_kept": 164, "requests_pruned": 1}
    for content in ((small, large), (large, small)):
        with counted(server, **kept):
            status, answer = ask(server, *content, NUMBER)
        assert status == 200, answer
    reason = {"the server's budget does not fit the picture": 1}
    with counted(server, visual_tokens_seen=64, visual_tokens_kept=64, **reason):
        status, answer = ask(server, small, NUMBER)
    assert status == 200, answer


def test_several_answers_are_counted_as_the_requests_that_lmdeploy_makes_of_them(server):
    """It prefills the prompt for each; the documentation says so."""
    expected = {"visual_tokens_seen": 432, "visual_tokens_kept": 300, "requests_pruned": 3}
    with counted(server, **expected):
        status, answer = ask(server, part(SAMPLES[0]), NUMBER, n=3)
    assert status == 200, answer
    assert len(answer["choices"]) == 3


def test_pictures_of_earlier_turns_have_their_own_budgets(server):
    messages = [
        {"role": "user", "content": [part(SAMPLES[0], {"keep": 8}), {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "10"},
        {"role": "user", "content": [part(SAMPLES[1]), {"type": "text", "text": NUMBER}]},
    ]
    expected = {"visual_tokens_seen": 288, "visual_tokens_kept": 108, "requests_pruned": 1}
    with counted(server, **expected):
        status, answer = ask(server, messages=messages)
    assert status == 200, answer


def bodies(wish):
    """For each row of the table in the documentation, a request with a picture that asks `wish`."""
    picture, own = part(SAMPLES[0]), {"entropyprune": wish}
    url = picture["image_url"]["url"]
    media, data = url.removeprefix("data:").split(";base64,")
    token = read_config(demo.MODEL)["image_token_id"]
    with_ids = {"input_ids": [9, token, 11], "image_data": {"url": url} | own}
    prompt = [{"type": "text", "text": "<IMAGE_TOKEN>what?"}, picture | own]
    source = {"type": "base64", "media_type": media, "data": data}
    chat = {"model": str(demo.MODEL), "max_tokens": 3}

    def messages(*content):
        return {"messages": [{"role": "user", "content": content}]}

    return {
        ("/v1/chat/completions", "parts of `messages`"): messages(picture | own),
        ("/v1/chat/completions", "`image_data` beside `input_ids`"): {"messages": []} | with_ids,
        ("/generate", "`image_data`"): {"prompt": "<IMAGE_TOKEN>what?"}
        | {"image_data": with_ids["image_data"]},
        ("/v1/completions", "parts of messages in `prompt`"): {
            "prompt": [messages(*prompt)["messages"]]
        },
        ("/v1/messages", "`image` blocks of `messages`"): messages(
            {"type": "image", "source": source | own} | own
        ),
        ("/v1/messages", "`image_data` beside `input_ids`"): {"messages": []} | with_ids,
        ("/v1/responses", "none"): {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": url} | own]}
            ]
        },
    }, chat


def documented():
    """The same rows from the documentation, and what it says of a budget of the picture's own."""
    page = (Path(__file__).parents[2] / "docs/lmdeploy.md").read_text()
    rows = re.findall(r"^\| `(/\S+)` \| (.*?) \| (.*?) \|$", page, re.M)
    return {(endpoint, form): says for endpoint, form, says in rows}


def test_every_endpoint_is_documented():
    assert list(documented()) == list(bodies(None)[0])


@pytest.mark.parametrize("row", list(documented()), ids=" ".join)
def test_endpoint_does_what_the_documentation_says(server, row):
    says = documented()[row]
    requests, more = bodies({"keep": 16})
    refused = says.startswith("refused")
    kept = {"read": 16}.get(says, 100)
    pruned = {"visual_tokens_seen": 144, "visual_tokens_kept": kept, "requests_pruned": 1}
    with counted(server, **({} if refused else pruned)):
        status, answer = post(
            server + row[0], more | requests[row], **{"anthropic-version": "2023-06-01"}
        )
    assert status == (400 if refused else 200), answer


def test_logprobs_of_the_prompt_switch_pruning_off(server):
    url = part(SAMPLES[0])["image_url"]["url"]
    body = {
        "prompt": "<IMAGE_TOKEN>what number is written?",
        "image_data": url,
        "max_tokens": 0,
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    reason = {"the request asks for logprobs of its prompt": 1}
    with counted(server, visual_tokens_seen=144, visual_tokens_kept=144, **reason):
        status, answer = post(f"{server}/generate", body)
    assert status == 200, answer
    assert len(answer["meta_info"]["input_token_logprobs"]) > 144


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"keep": 1.6}, "keep=1.6 is outside"),
        ({"keep": 145}, "keep=145 asks for more than a span of 144 tokens has"),
        ({"layer": 1}, "a request cannot set 'layer', only keep, average"),
        ({"flops": 0.5}, "a request cannot set 'flops'"),
        ({"keep": 5, "details": True}, "a request cannot set 'details'"),
        ({"keep": 1}, "keep=1 is one token to some JSON writers and every token to others"),
        ("of", "entropyprune='of' cannot be read"),
        (5, "entropyprune=5 cannot be read"),
    ],
)
def test_request_that_asks_for_nonsense_fails_alone(server, wish, message):
    with counted(server):
        status, answer = ask(server, part(SAMPLES[0]), part(SAMPLES[1], wish), NUMBER)
    assert status == 400, answer
    assert message in answer["message"]
    status, answer = ask(server, part(SAMPLES[0]), NUMBER)
    assert status == 200, "the server did not survive a bad request"


def test_wish_in_another_place_is_not_dropped(server):
    text = {"type": "text", "text": NUMBER, "entropyprune": "off"}
    status, answer = ask(server, part(SAMPLES[0]), text)
    assert status == 400, answer
    assert "stands beside a picture" in answer["message"]


def test_policy_in_hf_overrides(tmp_path):
    override = ("--hf-overrides", json.dumps(OVERRIDES))
    with serve(tmp_path, "ep_backends.lmdeploy", *API_SERVER, *override) as address:
        expected = {"visual_tokens_seen": 144, "visual_tokens_kept": 36, "requests_pruned": 1}
        with counted(address, **expected):
            status, answer = ask(address, part(SAMPLES[0]), NUMBER)
        assert status == 200, answer
