"""JSON Schemas that structured output must keep, in families; and some that must be refused."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "maxLength": 12}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}


def obj(properties: Schema, *optional: str, **more: Any) -> Schema:
    """A closed object; what is not optional is required."""
    required = [name for name in properties if name not in optional]
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**closed, "required": required, **more}


def array(items: Any, low: int | None = None, high: int | None = 4, **more: Any) -> Schema:
    """Between ``low`` and ``high`` items."""
    bounds = {"minItems": low, "maxItems": high}
    return {
        "type": "array",
        "items": items,
        **{name: bound for name, bound in bounds.items() if bound is not None},
        **more,
    }


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def tagged(kind: str, **properties: Any) -> Schema:
    return obj({"kind": {"const": kind}, **properties})


STRINGS: list[Schema] = [
    {"type": "string"},
    STRING,
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "minLength": 8, "maxLength": 8},
    {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 2, "maxLength": 40},
    {"type": "string", "enum": ["red", "green", "blue"]},
    {"type": "string", "enum": ["", " ", "\n", '"', "\\"]},
    {"type": "string", "enum": ["é", "日本語", "🙂"]},
    {"const": "only this"},
    *(
        {"type": "string", "pattern": pattern}
        for pattern in (
            "^[a-z]+$",
            "^[A-Z]{2}[0-9]{3}$",
            "^(a|bc|def)*$",
            "^\\d{3}-\\d{4}$",
            '^[^"\\\\]{1,5}$',
            "^\\+?[1-9][0-9]{6,14}$",
            "^#[0-9a-fA-F]{6}$",
            "^[a-z0-9-]{3,16}$",
            "^v\\d+\\.\\d+\\.\\d+$",
            "^(?:yes|no|maybe)$",
            "^.{4}$",
            "ab",
        )
    ),
    *(
        {"type": "string", "format": name}
        for name in (
            "date",
            "time",
            "date-time",
            "duration",
            "email",
            "hostname",
            "ipv4",
            "ipv6",
            "uuid",
            "uri",
        )
    ),
]

NUMBERS: list[Schema] = [
    INTEGER,
    NUMBER,
    {"type": "integer", "minimum": 0},
    {"type": "integer", "maximum": -1},
    {"type": "integer", "minimum": 1, "maximum": 6},
    {"type": "integer", "minimum": -20, "maximum": 20},
    {"type": "integer", "minimum": 1000, "maximum": 1004},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    {"type": "integer", "minimum": 0, "maximum": 65535},
    {"type": "integer", "multipleOf": 5},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "number", "exclusiveMaximum": 0},
    {"type": "number", "minimum": -273.15},
    {"type": "number", "minimum": 0.25, "maximum": 0.75},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": 1.5},
    {"type": "number", "maximum": 1000000},
    {"enum": [1, 2, 3]},
    {"enum": [1.5, -2, 0]},
    {"const": 42},
    {"type": ["integer", "null"]},
]

CONSTANTS: list[Schema] = [
    BOOLEAN,
    NULL,
    {"const": True},
    {"const": None},
    {"const": {"a": [1, {"b": None}]}},
    {"const": []},
    {"enum": [None, True, 1, "a", [], {}]},
    {"enum": [[1, 2], [3]]},
    {"enum": [{"x": 1}, {"y": "z"}]},
    {"type": ["string", "boolean"], "maxLength": 4},
    {"type": ["boolean", "null", "integer"]},
]

OBJECTS: list[Schema] = [
    obj({}),
    obj({"a": INTEGER}),
    obj({"a": INTEGER}, "a"),
    obj({"a": STRING, "b": BOOLEAN, "c": NULL}),
    obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, "b"),
    obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, "a", "b", "c"),
    obj({"last": INTEGER, "first": INTEGER}, "last"),
    obj({'quote"d': BOOLEAN, "back\\slash": NULL}),
    obj({"ключ": BOOLEAN, "emoji 🙂": NULL}),
    obj({"": INTEGER}),
    obj({"a": obj({"b": obj({"c": obj({"d": BOOLEAN})})})}),
    obj({"left": obj({"x": INTEGER, "y": INTEGER}), "right": obj({"x": INTEGER}, "x")}),
    {"type": "object", "additionalProperties": INTEGER, "maxProperties": 3},
    {"type": "object", "additionalProperties": array(BOOLEAN), "maxProperties": 2},
    {"type": "object", "properties": {"id": INTEGER}, "required": ["id"], "maxProperties": 3},
    {
        "type": "object",
        "properties": {"id": INTEGER},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
    {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,4}$": INTEGER},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    {
        "type": "object",
        "patternProperties": {"^s_[a-z]{1,3}$": STRING, "^b_[a-z]{1,3}$": BOOLEAN},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
    },
    {"type": "object", "additionalProperties": NULL, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "required": ["free"], "maxProperties": 1},
    {"type": "object", "properties": {"a": True}, "required": ["a"], "maxProperties": 1},
    {"properties": {"a": INTEGER}, "required": ["a"], "type": "object", "maxProperties": 1},
    obj({"title": STRING, "description": STRING}, title="annotated", description="text"),
    obj({"old": {**INTEGER, "deprecated": True}, "dflt": {**INTEGER, "default": 3}}),
    obj({f"field_{i}": BOOLEAN for i in range(12)}),
    obj({f"field_{i}": BOOLEAN for i in range(8)}, *(f"field_{i}" for i in range(0, 8, 2))),
]

ARRAYS: list[Schema] = [
    array(INTEGER),
    array(INTEGER, 1),
    array(INTEGER, 3, 3),
    array(BOOLEAN, 0, 0),
    array(BOOLEAN, 2, 9),
    array(STRING, 1, 2),
    array(NULL, 5, 5),
    array({"enum": ["x", "y", "z"]}, 1, 6),
    array(array(INTEGER, 2, 2), 2, 2),
    array(array(array(BOOLEAN, 1, 2), 1, 2), 1, 2),
    array(obj({"x": NUMBER, "y": NUMBER}), 1, 3),
    array({"anyOf": [INTEGER, STRING]}, 1, 4),
    array(False, None, None),
    {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [BOOLEAN], "items": INTEGER, "minItems": 3, "maxItems": 5},
    {"type": "array", "prefixItems": [NULL, NULL, NULL], "items": False},
    {
        "type": "array",
        "prefixItems": [{"const": "op"}, NUMBER, NUMBER],
        "minItems": 3,
        "maxItems": 3,
    },
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "maxItems": 4},
    array({"type": "string", "format": "date"}, 1, 2),
    array(obj({"tags": array({"enum": ["a", "b"]}, 0, 3)}), 0, 2),
]

REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/n", "$defs": {"n": INTEGER}},
    {"$ref": "#/definitions/n", "definitions": {"n": BOOLEAN}},
    obj({"a": ref("n"), "b": ref("n")}, **{"$defs": {"n": {"type": "integer", "minimum": 9}}}),
    array(ref("point"), 1, 2, **{"$defs": {"point": obj({"x": INTEGER, "y": INTEGER})}}),
    obj({"a": {"$ref": "#/properties/b"}, "b": BOOLEAN}),
    {"$ref": "#/$defs/a", "$defs": {"a": ref("b"), "b": ref("c"), "c": {"enum": [1, 2]}}},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": BOOLEAN}},
    {"$ref": "#/$defs/a~0b", "$defs": {"a~b": NULL}},
    obj({"value": BOOLEAN, "next": {"anyOf": [{"$ref": "#"}, NULL]}}),
    obj({"name": {"enum": ["n"]}, "children": array({"$ref": "#"}, 0, 2)}),
    {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": {"anyOf": [NULL, array(ref("tree"), 2, 2)]}},
    },
    {
        "$ref": "#/$defs/even",
        "$defs": {
            "even": obj({"odd": ref("odd")}, "odd"),
            "odd": obj({"even": ref("even")}, "even"),
        },
    },
    {
        "$ref": "#/$defs/expression",
        "$defs": {
            "expression": {"anyOf": [BOOLEAN, ref("negation"), ref("both")]},
            "negation": obj({"not": ref("expression")}),
            "both": obj({"and": array(ref("expression"), 2, 2)}),
        },
    },
    {"allOf": [ref("base")], "$defs": {"base": obj({"id": INTEGER})}},
    {
        "allOf": [ref("base"), {"properties": {"b": BOOLEAN}, "required": ["b"]}],
        "type": "object",
        "maxProperties": 2,
        "$defs": {"base": {"properties": {"a": INTEGER}, "required": ["a"]}},
    },
]

UNIONS: list[Schema] = [
    {"anyOf": [INTEGER, BOOLEAN]},
    {"anyOf": [NULL, STRING]},
    {"anyOf": [obj({"a": INTEGER}), obj({"b": STRING})]},
    {"anyOf": [array(INTEGER, 1, 2), obj({"n": INTEGER}), NULL]},
    {"anyOf": [{"const": "a"}, {"const": "b"}, {"const": 3}]},
    {"anyOf": [{"anyOf": [NULL, BOOLEAN]}, {"anyOf": [INTEGER, STRING]}]},
    {"oneOf": [STRING, INTEGER]},
    {"oneOf": [tagged("circle", radius=NUMBER), tagged("square", side=NUMBER)]},
    {"oneOf": [NULL, array(BOOLEAN, 1, 3)]},
    array({"oneOf": [tagged("a", n=INTEGER), tagged("b", s=STRING)]}, 1, 3),
    {"allOf": [INTEGER, {"minimum": 3}, {"maximum": 8}]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
    {"allOf": [{"anyOf": [INTEGER, NULL]}, {"type": ["integer", "string"]}]},
    {"allOf": [{"enum": [1, 2, 3, 4]}, {"minimum": 3}]},
    obj({"a": {"anyOf": [INTEGER, NULL]}, "b": {"anyOf": [STRING, NULL]}}),
    obj({"shape": {"oneOf": [tagged("c", r=INTEGER), tagged("p", x=INTEGER, y=INTEGER)]}}),
    {"type": ["object", "null"], "additionalProperties": BOOLEAN, "maxProperties": 1},
    {"type": ["array", "integer"], "items": BOOLEAN, "maxItems": 3},
    {"anyOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}]},
    {"anyOf": [{"type": "string", "pattern": "^a+$"}, {"type": "integer", "maximum": 0}]},
]

DOCUMENTS: list[Schema] = [
    obj({"name": {"enum": ["get_weather"]}, "arguments": obj({"city": STRING, "days": INTEGER})}),
    {
        "anyOf": [
            obj({"name": {"const": "search"}, "arguments": obj({"query": STRING})}),
            obj({"name": {"const": "open"}, "arguments": obj({"id": INTEGER, "new": BOOLEAN})}),
        ]
    },
    array(obj({"name": {"enum": ["f", "g"]}, "parameters": obj({"x": NUMBER})}), 1, 2),
    obj(
        {
            "name": STRING,
            "born": {"type": "string", "format": "date"},
            "email": {"anyOf": [{"type": "string", "format": "email"}, NULL]},
            "address": obj({"street": STRING, "zip": {"type": "string", "pattern": "^\\d{5}$"}}),
        },
        "email",
    ),
    obj(
        {
            "number": {"type": "integer", "minimum": 1},
            "currency": {"enum": ["EUR", "USD", "JPY"]},
            "lines": array(obj({"item": STRING, "amount": NUMBER}), 1, 3),
            "paid": BOOLEAN,
        }
    ),
    obj({"type": {"const": "Point"}, "coordinates": array(NUMBER, 2, 3)}),
    {
        "oneOf": [
            obj({"type": {"const": "Point"}, "coordinates": array(NUMBER, 2, 2)}),
            obj({"type": {"const": "Line"}, "coordinates": array(array(NUMBER, 2, 2), 2, 3)}),
        ]
    },
    obj({"sentiment": {"enum": ["good", "bad"]}, "score": {"type": "number", "minimum": 0}}),
    obj({"answer": STRING, "sources": array(INTEGER, 0, 3), "sure": BOOLEAN}),
    obj({"steps": array(obj({"thought": STRING, "result": STRING}), 1, 2), "final": STRING}),
    obj({"rows": array(array({"anyOf": [NUMBER, NULL]}, 3, 3), 2, 2)}),
    obj(
        {
            "host": {"type": "string", "format": "hostname"},
            "port": {"type": "integer", "minimum": 1, "maximum": 65535},
            "tls": {"anyOf": [BOOLEAN, obj({"certificate": STRING})]},
            "labels": {"type": "object", "additionalProperties": STRING, "maxProperties": 2},
        },
        "tls",
        "labels",
    ),
    obj({"at": {"type": "string", "format": "date-time"}, "level": {"enum": ["info", "error"]}}),
    obj({"id": {"type": "string", "format": "uuid"}, "parent": {"anyOf": [ref("id"), NULL]}},
        **{"$defs": {"id": {"type": "string", "format": "uuid"}}}),
    obj({"move": {"type": "string", "pattern": "^[a-h][1-8][a-h][1-8][qrbn]?$"}, "check": BOOLEAN}),
    obj({"entities": array(obj({"text": STRING, "at": INTEGER, "label": {"enum": ["P", "O"]}}))}),
]  # fmt: skip

SCHEMAS: list[Schema] = [
    *STRINGS,
    *NUMBERS,
    *CONSTANTS,
    *OBJECTS,
    *ARRAYS,
    *REFERENCES,
    *UNIONS,
    *DOCUMENTS,
]

REFUSED: dict[str, Schema] = {
    "not": {"not": STRING},
    "if": {"if": INTEGER, "then": {"minimum": 3}},
    "uniqueItems": array(INTEGER, uniqueItems=True),
    "contains": {"type": "array", "contains": INTEGER},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a$"}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "nope": {"type": "string", "format": "nope"},
    "Invalid type": {"type": "text"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 3}]},
    "nowhere": {"$ref": "#/$defs/nowhere"},
    "example.com": {"$ref": "https://example.com/schema.json"},
    "etc/passwd": {"$ref": "file:///etc/passwd"},
    "Unsatisfiable": {"type": "integer", "minimum": 5, "maximum": 3},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "unlenient": {"type": "string", "format": "unlenient", "x-guidance": {"lenient": True}},
}
