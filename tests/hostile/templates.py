"""Chat templates that never end, take all memory, or cannot be rendered."""

from __future__ import annotations

_LOOP = "{% for i in range(99999) %}"
_END = "{% endfor %}"
_DOUBLE = (
    "{% set ns = namespace(s='xxxxxxxxxx', l=[1, 2]) %}" + _LOOP + "{% set ns.s = STEP %}" + _END
)
_BIG = "{% set b = 'x' * 3999999 %}"

# templates that have to end soon, by what they do
BOMBS = {
    "nested loops": _LOOP + _LOOP + _LOOP + "x" + _END * 3,
    "nested loops without output": _LOOP + _LOOP + "{% set x = i %}" + _END * 2,
    "loop that filters": _LOOP + "{% for j in range(99999) if false %}{% endfor %}" + _END,
    "loops over the loop": _LOOP + "{% if loop.length > 3 %}{% for j in range(99999) %}"
    "{{ loop.last }}{% endfor %}{% endif %}" + _END,
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "range in a list": "{{ range(10**9)|list }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "wide recursive loop": "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}"
    "{% endfor %}",
    "repeated text": "{{ 'x' * 10**10 }}",
    "repeated text from the right": "{{ 10000000000 * 'x' }}",
    "repeated list": "{{ ([0] * 10**9)|length }}",
    "repeated nested list": "{{ [[[0] * 4000] * 4000] * 4000 }}",
    "repeated tuple": "{{ (0,) * 10**9 }}",
    "power": "{{ 10**(10**10) }}",
    "power of a power": "{% set x = 10**3000 %}{{ x**x }}",
    "product of integers": "{% set ns = namespace(s=10) %}"
    + _LOOP
    + "{% set ns.s = ns.s * ns.s %}"
    + _END,
    "format operator": "{{ '%1000000000d' % 1 }}",
    "format with a precision": "{{ '%.1000000000f' % 1.5 }}",
    "format with a given width": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format of a long text": _BIG + "{{ '%s%s%s%s%s%s%s%s%s%s' * 999 % ((b,) * 9990) }}",
    "format method": "{{ '{:>1000000000}'.format(1) }}",
    "format method with a given width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format method, repeated": _BIG + "{{ ('{0}' * 9999).format(b) }}",
    "format_map": _BIG + "{{ ('{b}' * 9999).format_map({'b': b}) }}",
    "center filter": "{{ 'x'|center(10**9) }}",
    "center filter, constant": "{{ 'x'|center(1000000000) }}",
    "center method": "{{ 'x'.center(10**9) }}",
    "ljust method": "{{ 'x'.ljust(10**9) }}",
    "zfill method": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs method": "{{ '\t'.expandtabs(1000000000) }}",
    "translate method": _BIG + "{{ b.translate({120: b}) }}",
    "replace method": _BIG + "{{ b.replace('x', b) }}",
    "replace method of nothing": _BIG + "{{ b.replace('', b) }}",
    "replace filter": _BIG + "{{ b|replace('x', b) }}",
    "join method": _BIG + "{{ b.join(b) }}",
    "join filter": _BIG + "{{ b|join(b) }}",
    "join of many": _BIG + "{{ ([b] * 999)|join }}",
    "indent filter": "{{ ('x\n' * 99999)|indent(99999) }}",
    "indent filter with a text": "{% set i = ' ' * 99999 %}{{ ('x\n' * 99999)|indent(i) }}",
    "tojson with an indent": "{{ ([0] * 99999)|tojson(indent=99999) }}",
    "tojson with a text": "{{ ([0] * 99999)|tojson(indent='x' * 99999) }}",
    "batch filter": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice filter": "{{ [1]|slice(10**9)|list }}",
    "round filter": "{{ 1|round(10**9, 'ceil') }}",
    "sum of lists": "{{ ([[1]] * 99999)|sum(start=[]) }}",
    "map filter": "{{ ['x', 'y']|map('center', 1000000000)|list }}",
    "filler text": "{{ lipsum(n=1000000) }}",
    "bytes of an integer": "{{ (1).to_bytes(1000000000, 'big') }}",
    "bytes of text": "{{ 'x'.encode().center(1000000000) }}",
    "doubled by ~": _DOUBLE.replace("STEP", "ns.s ~ ns.s"),
    "doubled by +": _DOUBLE.replace("STEP", "ns.s + ns.s"),
    "doubled by join": _DOUBLE.replace("STEP", "[ns.s, ns.s]|join"),
    "doubled by format": _DOUBLE.replace("STEP", "'%s%s' % (ns.s, ns.s)"),
    "doubled by format method": _DOUBLE.replace("STEP", "'{0}{0}'.format(ns.s)"),
    "doubled by replace": _DOUBLE.replace("STEP", "ns.s.replace('x', 'xx')"),
    "doubled by *": _DOUBLE.replace("STEP", "ns.s * 2"),
    "doubled by escape": _DOUBLE.replace("STEP", "('<' ~ ns.s)|replace('x', '<')|e|string"),
    "doubled by tojson": _DOUBLE.replace("STEP", "ns.s|tojson|tojson"),
    "doubled by urlencode": _DOUBLE.replace("STEP", "('%' ~ ns.s)|urlencode"),
    "doubled by a block": "{% set ns = namespace(s='xx') %}"
    + _LOOP
    + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"
    + _END,
    "doubled by a macro": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}"
    "{% set ns = namespace(s='xx') %}" + _LOOP + "{% set ns.s = m(ns.s) %}" + _END,
    "doubled list": "{% set ns = namespace(s=[1]) %}"
    + _LOOP
    + "{% set ns.s = ns.s + ns.s %}"
    + _END,
    "list that holds itself twice": _DOUBLE.replace("STEP", "[ns.s, ns.s]") + "{{ ns.s }}",
    "tuple that holds itself twice": _DOUBLE.replace("STEP", "(ns.s, ns.s)") + "{{ ns.s }}",
    "dict that holds itself twice": _DOUBLE.replace("STEP", "{1: ns.s, 2: ns.s}")
    + "{{ ns.s|tojson }}",
    "dict() that holds itself twice": _DOUBLE.replace("STEP", "dict(a=ns.s, b=ns.s)")
    + "{{ ns.s }}",
    "batch that holds itself twice": _DOUBLE.replace("STEP", "[ns.s]|batch(2, ns.s)|list")
    + "{{ ns.s }}",
    "compared lists that hold themselves": "{% set n = namespace(a=[1], b=[1]) %}"
    "{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
    "{{ n.a == n.b }}",
    "namespaces that hold each other": "{% set a = namespace() %}{% set b = namespace() %}"
    "{% set ns = namespace(l=[]) %}{% for i in range(60) %}{% set n = namespace() %}"
    "{% set n.x = [ns, ns] %}{% endfor %}{% set ns.l = [ns, ns] %}{{ ns }}",
    "list of many lists": _DOUBLE.replace("STEP", "[ns.s]") + "{{ ns.s }}",
    "many long texts": _BIG
    + "{% set ns = namespace(l=[]) %}"
    + _LOOP
    # each text is another one
    + "{% set ns.l = ns.l + [b ~ i] %}"
    + _END,
    "many copies": _BIG + _LOOP + "{{ b }}" + _END,
    "many copies in a block": _BIG + "{% set x %}" + _LOOP + "{{ b }}" + _END + "{% endset %}",
    "many searches": _BIG + _LOOP + "{% if 'xxxxy' in b %}{% endif %}" + _END,
    "many searches in a line": _BIG + "{{ [" + "'xxxxy' in b, " * 8000 + "] }}",
    "many comparisons": _BIG + "{% set c = 'x' * 3999999 %}" + _LOOP + "{{ b == c }}" + _END,
    "many slices": _BIG + _LOOP + "{% set c = b[1:] %}" + _END,
    "many slices in a line": _BIG + "{{ [" + "b[1:], " * 9999 + "]|length }}",
    "many sorts": "{% set l = ['x', 'y'] * 99999 %}" + _LOOP + "{% set c = l|sort %}" + _END,
    "many strips": _BIG + _LOOP + "{% set c = b.strip('y') %}" + _END,
    "many splits": _BIG + _LOOP + "{% set c = b.split('x') %}" + _END,
    "macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(99) }}",
    "block that calls itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep conditions": "{% if true %}" * 500 + "x" + "{% endif %}" * 500,
    "deep loops": "{% for i in [1] %}" * 50 + "x" + "{% endfor %}" * 50,
    "long sum": "{{ " + " + ".join(["messages"] * 5000) + " }}",
    "long template": "x" * (20 << 20),
    "long date": "{{ strftime_now('%Y' * 999999) }}",
    "unclosed dates": "{{ strftime_now('" * 9999,
    "long number": "{{ " + "9" * 5000 + " }}",
}
# templates that cannot be rendered, with the line of the fault
FAULTS = {
    "syntax": ("x\n\n{% if %}", 3),
    "unclosed block": ("x\n{% for m in messages %}", 2),
    "unclosed expression": ("x\n{{ messages", 2),
    "unknown tag": ("\n{% load x %}", 2),
    "unknown filter": ("x\n{{ messages|nosuch }}", 2),
    "unknown test": ("x\n{{ messages is nosuch }}", 2),
    "attribute of nothing": ("x\n{{ nosuch.a }}", 2),
    "call of nothing": ("x\n{{ nosuch() }}", 2),
    "item of nothing": ("x\n\n\n{{ messages[99].content }}", 4),
    "sum of different types": ("x\n{{ 1 + 'x' }}", 2),
    "loop over a number": ("x\n{% for i in 3 %}{% endfor %}", 2),
    "division by zero": ("x\n{{ 1 // 0 }}", 2),
    "overflow": ("x\n{{ 1e308 ** 2 }}", 2),
    "wrong argument": ("x\n{{ 'x'|center(1, 2, 3) }}", 2),
    "wrong format": ("x\n{{ '%d' % 'x' }}", 2),
    "not for JSON": ("x\n{{ range|tojson }}", 2),
    "internals": ("x\n{{ ''.__class__.__mro__ }}", 2),
    "globals": ("x\n{{ raise_exception.__globals__['os'].system('x') }}", 2),
    "changed messages": ("x\n{{ messages.append(1) }}", 2),
    "include": ("x\n{% include '/etc/passwd' %}", 2),
    "import": ("x\n{% import 'x' as y %}", 2),
    "extends": ("x\n{% extends '/etc/passwd' %}", 2),
    "raised": ("x\n{{ raise_exception('not\nso') }}", 2),
    "raised without a text": ("x\n{{ raise_exception() }}", 2),
    "surrogate": ("x\n{{ '\\ud800'.encode() }}", 2),
}
