"""LMDeploy's command line with pruning: `python -m ep_backends.lmdeploy serve api_server ...`."""

from ep_backends.lmdeploy import activate

activate()

if __name__ == "__main__":
    from lmdeploy.cli.entrypoint import run

    run()
