"""What a page about runs is put together from, and how each block is drawn."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Text:
    kind: ClassVar = "text"
    text: str
    bad: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """The few numbers that are read first."""

    kind: ClassVar = "facts"
    facts: list[tuple[str, str, str]]  # name, value, and what stands below it


@dataclasses.dataclass(frozen=True)
class Bar:
    """A cell: a text, and a bar as long as the share."""

    text: str
    share: float


@dataclasses.dataclass(frozen=True)
class Key:
    """A cell: a text, and how the line of that name is drawn."""

    text: str
    color: str
    dash: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells line by line, the header first."""

    kind: ClassVar = "table"
    title: str
    lines: list[list[str | Bar | Key]]
    words: bool = False  # cells hold words, not numbers


@dataclasses.dataclass(frozen=True)
class Charts:
    """Beside each other, where there is room."""

    kind: ClassVar = "charts"
    charts: list[dict | Table]  # of overview.chart


@dataclasses.dataclass(frozen=True)
class Stack:
    """One bar of several parts."""

    kind: ClassVar = "stack"
    title: str
    parts: list[tuple[str, float, str, int]]  # name, share, text, colour


@dataclasses.dataclass(frozen=True)
class Picture:
    kind: ClassVar = "picture"
    uri: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    kind: ClassVar = "fold"
    summary: str
    blocks: list


@dataclasses.dataclass(frozen=True)
class Section:
    heading: str
    blocks: list


COLORS = """--s0: #0067b1; --s1: #c04a00; --s2: #00805c; --s3: #a34a87; --s4: #876a00; --s5: #4c4fb5; --s6: #66707a;"""
DARK = """--s0: #62b5f0; --s1: #ff9a57; --s2: #41cfa2; --s3: #e9a3d1; --s4: #e0c34c; --s5: #b0b4ff; --s6: #aab4be;"""
STYLE = (
    f":root {{{COLORS}}} @media (prefers-color-scheme: dark) {{ :root {{{DARK}}} }}\n"
    + " ".join(f".s{place} {{ --c: var(--s{place}); }}" for place in range(7))
    + """ .reference { --c: var(--grey); }
.under { color: var(--grey); margin-top: 0; } section { margin-top: 2.2rem; } h3 { margin: 1.2rem 0 .2rem; }
.charts h3 { margin-top: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .7rem;
  min-width: 0; overflow-wrap: anywhere; }
.facts dt { color: var(--grey); font-size: .87rem; }
.facts dd { margin: 0; } .facts .value { font-size: 1.35rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem 1.4rem;
  align-items: start; margin: .6rem 0; }
figure { margin: 0; min-width: 0; } figcaption { display: flex; justify-content: space-between; gap: .6rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; }
svg text { fill: var(--grey); font-variant-numeric: tabular-nums; } .grid { stroke: var(--line); }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.dot { fill: var(--c); } .touch { fill: transparent; } .touch:hover { fill: var(--c); fill-opacity: .35; }
.band { fill: var(--s2); fill-opacity: .14; } .right { fill: var(--s0); } .wrong { fill: var(--s1); }
.outside { fill: var(--s3); } .mark { fill-opacity: .6; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .87rem; margin: .2rem 0; padding: 0; }
.legend span, td .key { white-space: nowrap; } .legend span { overflow: hidden; text-overflow: ellipsis; }
.key svg { display: inline-block; width: 24px; height: 10px; vertical-align: middle; margin-right: .4rem; }
td .bar { display: block; height: .28rem; margin-top: .15rem; border-radius: .14rem; background: var(--s0); }
td { vertical-align: top; } td:first-child { min-width: 6.5rem; } td.has-bar { min-width: 5.5rem; }
.words td, .words th { text-align: left; vertical-align: top; } td + td { white-space: nowrap; }
.words td + td { white-space: normal; } @media (min-width: 40rem) { .words td:first-child { white-space: nowrap; } }
.words td { overflow-wrap: anywhere; min-width: 3.5rem; max-width: 34rem; } .words td.long { min-width: 15rem; }
 thead th { font-weight: 600; }
.stack { display: flex; height: 1.7rem; border-radius: .35rem; overflow: hidden; gap: 1px; margin: .4rem 0; }
.stack i { background: var(--c); min-width: 1px; } .swatch { display: inline-block; width: .75rem; height: .75rem;
  border-radius: .15rem; background: var(--c); margin-right: .35rem; vertical-align: -.06rem; }
.wide img { display: block; min-width: 44rem; max-width: 100%; } details { margin: .6rem 0; }
"""
)
KEY = """<span class="key"><svg viewBox="0 0 24 10" class="{{ color }}" aria-hidden="true"><path
d="M2,5L22,5" class="line" stroke-dasharray="{{ dash }}"/></svg>"""
CHART = """
{% macro chart_of(chart) %}
<figure><figcaption><b>{{ chart.title }}</b><span>{{ chart.last }}</span></figcaption>
<svg viewBox="0 0 {{ chart.width }} {{ chart.height }}" role="img" aria-label="{{ chart.text }}">
<text x="0" y="12">{{ chart.unit }}</text>
{% if chart.band %}<polygon points="{{ chart.band }}" class="band"/>{% endif %}
{% for tick in chart.upward %}
<path d="M{{ chart.left }},{{ tick.at }}H{{ chart.right }}" class="grid"/>
<text x="{{ chart.left - 6 }}" y="{{ tick.at + 4 }}" text-anchor="end">{{ tick.text }}</text>
{% endfor %}
{% for tick in chart.across %}
<path d="M{{ tick.at }},{{ chart.bottom }}v4" class="grid"/>
<text x="{{ tick.at }}" y="{{ chart.bottom + 16 }}" text-anchor="middle">{{ tick.text }}</text>
{% endfor %}
<text x="{{ (chart.left + chart.right) / 2 }}" y="{{ chart.height - 3 }}" text-anchor="middle">{{
chart.across_text }}</text>
{% for line in chart.lines %}
<g class="{{ line.color }}"><path d="{{ line.path }}" class="line" stroke-dasharray="{{ line.dash }}"/>
{% for mark in line.marks %}
{% if line.marked %}<circle cx="{{ mark.x }}" cy="{{ mark.y }}" r="2" class="dot"/>{% endif %}
<circle cx="{{ mark.x }}" cy="{{ mark.y }}" r="6" class="touch"><title>{{ mark.text }}</title></circle>
{% endfor %}</g>
{% endfor %}
{% for mark in chart.marks %}
<path d="{{ mark.d }}" class="mark {{ mark.group }}"><title>{{ mark.name }}</title></path>
{% endfor %}
</svg>
{% if chart.lines|length > 1 %}
<p class="legend">{% for line in chart.lines %}{{ key(line.color, line.dash) }}{{ line.name }} <b>{{
line.last }}</b></span>{% endfor %}</p>
{% elif chart.groups %}
<p class="legend">{% for group in chart.groups %}<span class="key"><svg viewBox="-12 -5 24 10"
aria-hidden="true"><path d="M0,0{{ group.d }}" class="{{ group.name }}"/></svg>{{ group.name }} <b>{{
group.count }}</b></span>{% endfor %}</p>
{% endif %}
{% if chart.note %}<p class="grey">{{ chart.note }}</p>{% endif %}
</figure>
{% endmacro %}
"""
TABLE = """
{% macro cell_of(cell) %}
{% if cell is string %}{{ cell }}{% elif cell.share is defined %}{{ cell.text }}<span class="bar" style="width: {{
"%.1f"|format(100 * cell.share) }}%"></span>{% else %}{{ key(cell.color, cell.dash) }}{{ cell.text }}</span>{% endif %}
{% endmacro %}
{% macro table_of(table) %}
{% if table.title %}<h3>{{ table.title }}</h3>{% endif %}
<div class="wide" tabindex="0"><table{% if table.words %} class="words"{% endif %}>
<thead><tr>{% for cell in table.lines[0] %}<th scope="col">{{ cell_of(cell) }}</th>{% endfor %}</tr></thead>
{% for line in table.lines[1:] %}
<tr>{% for cell in line %}<td{% if cell.share is defined %} class="has-bar"
{%- elif cell is string and cell|length > 40 %} class="long"{% endif %}>{{
cell_of(cell) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
"""
TEMPLATE = (
    """{% extends "base" %}
{% macro key(color, dash) %}"""
    + KEY
    + """{% endmacro %}"""
    + CHART
    + TABLE
    + """
{% macro show(blocks) %}
{% for block in blocks %}
{% if block.kind == "text" %}<p class="plain {{ 'bad' if block.bad else 'grey' }}">{{ block.text }}</p>
{% elif block.kind == "facts" %}<dl class="facts">{% for name, value, note in block.facts %}
<div><dt>{{ name }}</dt><dd class="value">{{ value }}</dd><dd class="grey">{{ note }}</dd></div>{% endfor %}</dl>
{% elif block.kind == "table" %}{{ table_of(block) }}
{% elif block.kind == "charts" %}<div class="charts">{% for item in block.charts %}
{% if item.kind is defined %}<div>{{ table_of(item) }}</div>{% else %}{{ chart_of(item) }}{% endif %}
{% endfor %}</div>
{% elif block.kind == "stack" %}<div class="stack" role="img" aria-label="{{ block.title }}: {% for name, _, text, _
in block.parts %}{{ name }} {{ text }}; {% endfor %}">{% for name, share, text, color in block.parts %}<i class="s{{
color }}" style="flex: {{ share }} 1 0" title="{{ name }}: {{ text }}"></i>{% endfor %}</div>
<p class="legend">{% for name, _, text, color in block.parts %}<span><i class="swatch s{{ color }}"></i>{{ name
}} <b>{{ text }}</b></span>{% endfor %}</p>
{% elif block.kind == "picture" %}<p>{{ block.caption }}</p>
<div class="wide" tabindex="0"><img src="{{ block.uri }}" alt="{{ block.caption }}"></div>
{% else %}<details><summary>{{ block.summary }}</summary>{{ show(block.blocks) }}</details>
{% endif %}
{% endfor %}
{% endmacro %}
{% block body %}
<header><h1>{{ title }}</h1><p class="under plain">{{ under }}</p></header>
{{ show(head) }}
{% for section in sections %}
<section><h2>{{ section.heading }}</h2>
{{ show(section.blocks) }}
</section>
{% endfor %}
{% endblock %}
"""
)
