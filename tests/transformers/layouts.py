"""Pictures with separators, as families with rows of tokens have them."""

from dataclasses import replace

from ep_core.plan import Run, Unit


def by_rows(width):
    """A family's layout: rows of so many tokens, with a separator behind each."""

    def layout(config, placeholder, item):
        runs = range(placeholder.run.start, placeholder.run.stop - 1, width + 1)
        last = placeholder.run.stop - 1
        return (Unit(tuple(Run(at, min(at + width, last)) for at in runs), item),)

    return layout


def in_rows(pruning, width):
    """Give what is switched on a family whose pictures have separators."""
    settings = pruning._settings
    family = replace(settings.family, layout=by_rows(width))
    pruning._settings = replace(settings, family=family)
