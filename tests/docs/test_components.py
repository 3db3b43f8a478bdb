"""The pages of components: every one says what it computes, what it costs, when to use it and where it comes from."""

import importlib.util
import re
from pathlib import Path

import pytest

from niwaki.component import REGISTRY
from niwaki.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SLOTS = ("saliency", "normalization", "allocation", "compensation", "penalty", "relaxation", "growth", "selection", "gradient")
assert set(SLOTS) <= set(Recipe.model_fields)  # and reading that registers all components
COMPONENTS = [(slot, name) for slot in SLOTS for name in REGISTRY[slot]]


def pages():
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("slot", "name"), COMPONENTS)
def test_a_component_says_what_a_user_has_to_know(slot, name):
    component = REGISTRY[slot][name]
    for field in ("equation", "source", "effort", "advice"):
        said = getattr(component, field)
        assert len(said) > 3, f"{field} of {slot} {name}"
        assert said == said.strip()
        assert field == "equation" or not said.endswith("."), f"{field} of {slot} {name} is no sentence"
    assert re.search(r"[0-9]{4}", component.source) or name == "uniform"


@pytest.mark.parametrize("slot", SLOTS)
def test_the_page_of_a_slot_has_all_of_them_with_all_settings(slot):
    module = pages()
    text = module.slot(slot)
    for component, names in module.names(slot).items():
        section = text.split(f"{{ #{slot}-{names[0]} }}")[1].split("\n### ")[0]
        assert f"](#{slot}-{names[0]})" in text.split("\n### ")[0]
        assert component.effort.split("|")[0] in section
        assert component.advice in section
        for field in component.model_fields:
            assert f"`{field}" in section, f"{field} of {names[0]}"
    assert (ROOT / "docs" / module.PAGES[slot]).read_text(encoding="utf-8").count(f"<!-- slot {slot} -->") == 1


@pytest.mark.parametrize(("slot", "name"), COMPONENTS)
def test_settings_are_explained(slot, name):
    module, component = pages(), REGISTRY[slot][name]
    described, body = module.descriptions(component), " ".join([*module.body(component), component.equation])
    for field, said in component.model_fields.items():
        choices = [str(choice) for choice in getattr(said.annotation, "__args__", ())]
        assert field in described or field in body or any(f"`{choice}`" in body for choice in choices), f"{field} of {slot} {name}"
