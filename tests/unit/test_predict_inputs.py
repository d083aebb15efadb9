"""predict.py repeats Request's table, since Cog reads the file without running it."""

import ast
import inspect
import subprocess
import sys
from math import inf
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import cog
import pytest
from cog import BasePredictor

from panorama.request import INPUTS
from predict import Predictor

ROOT = Path(__file__).parents[2]
SIGNATURE = inspect.signature(Predictor.predict)


def predict_definition() -> ast.FunctionDef:
    tree = ast.parse((ROOT / "predict.py").read_text())
    (predict,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "predict"
    )
    return predict


def test_the_predictor_is_one_that_cog_finds():
    assert issubclass(Predictor, BasePredictor)


def test_predict_has_the_inputs_of_the_table_in_its_order():
    assert list(SIGNATURE.parameters) == ["self", *INPUTS]


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_has_the_type_and_the_values_of_the_table(name):
    rule, field = INPUTS[name], SIGNATURE.parameters[name].default
    hint = get_type_hints(Predictor.predict)[name]
    types = get_args(hint) or (hint,)
    kind = {Path: cog.Path}.get(rule.kind, rule.kind)
    assert set(types) == {kind} | ({NoneType} if rule.optional else set())
    assert field.description == rule.description
    assert field.ge == (None if rule.minimum == -inf else rule.minimum)
    assert field.le == (None if rule.maximum == inf else rule.maximum)
    assert field.default == (None if rule.required else rule.default)
    assert type(field.default) in (*types, NoneType)
    assert field.choices == (list(rule.choices) or None)


def test_every_value_is_a_literal():
    predict = predict_definition()
    assert predict.decorator_list == []
    assert len(predict.args.defaults) == len(INPUTS)
    for call in predict.args.defaults:
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        assert call.func.id == "Input"
        assert call.args == []
        for keyword in call.keywords:
            ast.literal_eval(keyword.value)


def test_only_what_must_be_given_has_no_default():
    """To Cog, even `default=None` makes an input one that may be left out."""
    calls = predict_definition().args.defaults
    without = [
        name
        for name, call in zip(INPUTS, calls, strict=True)
        if "default" not in [keyword.arg for keyword in call.keywords]
    ]
    assert without == [name for name, rule in INPUTS.items() if rule.required]


def test_the_openapi_document_is_that_of_predict():
    command = [sys.executable, "script/openapi.py"]
    made = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, check=True
    )
    committed = (ROOT / ".cog" / "openapi_schema.json").read_bytes()
    assert made.stdout == committed, "run script/openapi"
