"""Patches are undone in any event."""

import pytest
import torch

from ep_core.errors import UnsupportedError
from ep_core.patching import Patches, missing_parameters


def test_missing_parameters_are_those_not_taken_by_name():
    def prefill(tokens, positions, /, layer, **options):
        return tokens

    assert missing_parameters(Greeter().hello, ("name",)) == []
    assert missing_parameters(Greeter().hello, ("self", "name", "x")) == ["self", "x"]
    assert missing_parameters(prefill, ("layer",)) == []
    assert missing_parameters(prefill, ("tokens",)) == ["tokens"], "positional only"


def shout(original):
    return lambda *args, **kwargs: f"{original(*args, **kwargs)}!"


class Greeter:
    def hello(self, name="you"):
        return f"hello {name}"

    @staticmethod
    def bye():
        return "bye"


def test_an_inherited_attribute_is_shadowed_and_the_shadow_removed():
    greeter, other = Greeter(), Greeter()
    patches = Patches()
    patches.replace(greeter, "hello", shout, parameters=("name",))
    assert greeter.hello("me") == "hello me!"
    assert other.hello() == "hello you", "another instance changed too"
    patches.undo()
    assert greeter.hello() == "hello you"
    assert vars(greeter) == {}


def test_an_own_attribute_is_put_back_as_the_same_object():
    greeter = Greeter()
    own = greeter.hello = lambda: "mine"
    patches = Patches()
    patches.replace(greeter, "hello", shout)
    assert greeter.hello() == "mine!"
    patches.undo()
    assert vars(greeter) == {"hello": own}


def test_a_class_and_its_static_method_are_restored_as_they_were():
    before = dict(vars(Greeter))
    patches = Patches()
    patches.replace(Greeter, "hello", shout, parameters=("self", "name"))
    patches.replace(Greeter, "bye", lambda original: staticmethod(shout(original)))
    assert (Greeter().hello(), Greeter.bye()) == ("hello you!", "bye!")
    patches.undo()
    assert dict(vars(Greeter)) == before


def test_the_forward_of_a_torch_module_can_be_replaced_and_restored():
    layer = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    before = layer(x)
    with Patches() as patches:
        patches.replace(layer, "forward", lambda original: lambda input: original(input) + 1)
        assert torch.equal(layer(x), before + 1)
    assert torch.equal(layer(x), before)
    assert "forward" not in vars(layer)


def test_changes_are_undone_last_first():
    greeter, order = Greeter(), []
    patches = Patches()
    patches.add(lambda: order.append("first"))
    patches.replace(greeter, "hello", shout)
    patches.add(lambda: order.append(greeter.hello()))
    patches.replace(greeter, "hello", shout)
    assert greeter.hello() == "hello you!!"
    patches.undo()
    assert order == ["hello you!", "first"]
    assert vars(greeter) == {}


def test_undoing_twice_does_nothing_more():
    greeter, undone = Greeter(), []
    patches = Patches()
    patches.add(lambda: undone.append(1))
    patches.replace(greeter, "hello", shout)
    patches.undo()
    greeter.hello = mine = lambda: "set later"
    patches.undo()
    assert undone == [1]
    assert greeter.hello is mine


def test_patches_can_be_used_again_after_undo():
    greeter, patches = Greeter(), Patches()
    for _ in range(2):
        patches.replace(greeter, "hello", shout)
        assert greeter.hello() == "hello you!"
        patches.undo()
        assert greeter.hello() == "hello you"


def test_leaving_by_an_exception_undoes_and_lets_it_through():
    greeter = Greeter()

    def use():
        with Patches() as patches:
            patches.replace(greeter, "hello", shout)
            raise KeyError(greeter.hello())

    with pytest.raises(KeyError, match="hello you!"):
        use()
    assert vars(greeter) == {}


def test_an_undo_that_raises_does_not_keep_the_others_from_being_undone():
    greeter, patches = Greeter(), Patches()
    patches.replace(greeter, "hello", shout)
    patches.add(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patches.undo()
    assert vars(greeter) == {}, "the host is left patched"


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("gone", (), r"cannot attach to Greeter\.gone: there is no such callable"),
        ("label", (), r"cannot attach to Greeter\.label: there is no such callable"),
        ("hello", ("name", "loud", "twice"), r"Greeter\.hello: it takes no loud, twice"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_left_alone(name, parameters, says):
    greeter = Greeter()
    greeter.label = "text"
    patches = Patches()
    with pytest.raises(UnsupportedError, match=says):
        patches.replace(greeter, name, shout, parameters=parameters)
    patches.undo()
    assert vars(greeter) == {"label": "text"}


def test_a_maker_that_raises_leaves_nothing_behind():
    greeter, patches = Greeter(), Patches()
    with pytest.raises(ZeroDivisionError):
        patches.replace(greeter, "hello", lambda original: 1 / 0)
    patches.undo()
    assert vars(greeter) == {}
