"""What ``niwaki methods NAME`` says of the components that a method chooses."""

from niwaki.component import REGISTRY


def words(text):
    return " ".join(text.split())


def test_components_of_stages_are_shown_with_cost_and_use(niwaki_command):
    shown = words(niwaki_command("methods", "woodfisher").out)
    for slot, name in (("saliency", "woodfisher"), ("allocation", "global"), ("compensation", "obs")):
        component = REGISTRY[slot][name]
        assert words(f"{slot} {name}: {component.equation}") in shown
        assert words(f"cost: {component.effort}") in shown
        assert words(f"when to use it: {component.advice}") in shown


def test_components_of_a_prune_are_shown_once(niwaki_command):
    shown = words(niwaki_command("methods", "dropnet").out)
    assert shown.count("saliency activity: ") == 1
    assert shown.count("allocation uniform: ") == 1
    assert "schedule" not in shown.partition("equations")[2]
