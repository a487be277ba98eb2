"""The style sheet of a report: light and dark, and for screens of all widths."""

from engine.report.html import constant

STYLE = constant(
    """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1a1d23;
  --soft: #5d6675; --line: #e1e4ea; --bad: #c0272d; --bad-card: #fdf0f0; --good: #1a7f45;
  --s0: #2563eb; --s1: #c2620a; --s2: #0a8f63; --s3: #c2257a; --s4: #7640d8; --s5: #0b83a3;
  --s6: #8a6d00; --s7: #55606f; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2028; --ink: #e7eaf0;
  --soft: #9aa4b4; --line: #2d3440; --bad: #ff8087; --bad-card: #35201f; --good: #5fd08b;
  --s0: #6fa3ff; --s1: #f5a04c; --s2: #42d3a0; --s3: #f47fb8; --s4: #b495ff; --s5: #4fc9e6;
  --s6: #e0c14a; --s7: #a9b3c2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
code { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.soft, .note { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0; font-size: 14px; }
a { color: var(--s0); text-decoration: none; } a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 10px;
  margin: 16px 0 0; }
.tile, .card, .chart, .scroll { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile { padding: 10px 12px; min-width: 0; }
.tile b { display: block; font-size: 21px; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { display: block; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.card { padding: 12px 14px; }
.warn { border-color: var(--bad); background: var(--bad-card); }
.warn ul { margin: 4px 0; padding-left: 20px; } .warn li { overflow-wrap: anywhere; }
.bad { color: var(--bad); } .good { color: var(--good); }
.charts { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
.chart { margin: 0; padding: 10px 10px 4px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline; padding: 0 4px; }
figcaption b { font-weight: 600; margin-right: auto; overflow-wrap: anywhere; }
.values { display: flex; flex-wrap: wrap; gap: 0 12px; } .several { flex: 1 0 100%; }
.value { font-variant-numeric: tabular-nums; font-size: 14px; } .note { font-size: 12px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.level { font-size: 10.5px; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.grid { stroke: var(--line); } line.level { stroke: var(--soft); stroke-dasharray: 5 4; }
.curve { fill: none; stroke-width: 1.4; stroke-linejoin: round; stroke-linecap: round; }
.range { opacity: 0.3; }
.curve.first { stroke-width: 1.9; }
.curve.dot { stroke-width: 6; }
.mark { display: inline-block; width: 12px; height: 4px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; position: sticky; top: 0; z-index: 1;
  background: var(--page); padding: 6px 0; font-size: 14px; }
.run { min-width: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 12px; border-top: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word; max-width: 30em; }
th code, td code { overflow-wrap: break-word; } td.long { min-width: 13em; }
thead th, .number { white-space: nowrap; }
thead tr > * { border-top: 0; } th { font-weight: 600; }
thead th { color: var(--soft); font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
details > summary { cursor: pointer; margin: 10px 0 8px; color: var(--s0); }
.picture { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 8px; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
img.small { width: min(100%, 640px); image-rendering: pixelated; }
footer { margin-top: 36px; color: var(--soft); font-size: 13px; }
@media (max-width: 600px) { td { overflow-wrap: anywhere; min-width: 7.5em; } }
@media print { nav, .legend { position: static; } .chart, .card, tr { break-inside: avoid; } }
"""
    + "".join(
        f".curve.s{i} {{ stroke: var(--s{i}); }} .mark.s{i} {{ background: var(--s{i}); }}\n"
        for i in range(8)
    )
)
