"""LMDeploy's own command line with pruning: `python -m ep_backends.lmdeploy serve api_server ...`.

A process that is spawned imports this file again, under another name, and is activated as well.
"""

from ep_backends.lmdeploy import activate

activate()

if __name__ == "__main__":
    from lmdeploy.cli.entrypoint import run

    run()
