"""Talking to a real server over HTTP."""

import json
import urllib.error
import urllib.request


def post(address, body, **headers):
    """The answer, or the status and the message of an error."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return 200, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def counters(address):
    """Our counters, labels other than the reason left out."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("entropyprune:") and "_created" not in line:
            name, value = line.rsplit(" ", 1)
            reason = name.split('reason="')[1].split('"')[0] if "reason=" in name else ""
            found[name.split("{")[0].removeprefix("entropyprune:"), reason] = float(value)
    return found
