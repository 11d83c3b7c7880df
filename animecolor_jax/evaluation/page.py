"""The frame and the look of the report's page. It loads nothing from elsewhere."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink: #22262e; --faint: #5b6472; --line: #dfe3e9; --back: #f4f5f7; --card: #fff; --best: #e6f4ec;
  --best-ink: #11633a; --accent: #0b6fb8; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
body > header { background: var(--card); border-bottom: 1px solid var(--line); padding: 28px 0 20px; }
body > header > div, main { max-width: 1320px; margin: 0 auto; padding: 0 28px; }
h1 { margin: 0 0 10px; font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 12px; font-size: 19px; }
h3 { margin: 22px 0 10px; font-size: 16px; }
h4 { margin: 0; font-size: 14px; overflow-wrap: anywhere; }
p { margin: 0 0 14px; color: var(--faint); max-width: 80ch; }
ul.chips { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; padding: 0; list-style: none; }
ul.chips li { padding: 3px 11px; border: 1px solid var(--line); border-radius: 99px; background: var(--back);
  font-size: 13px; color: var(--faint); }
ul.chips li:first-child { border-color: var(--accent); color: var(--accent); font-weight: 600; }
section { margin: 24px 0; padding: 22px 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); white-space: normal;
  overflow-wrap: anywhere; min-width: 9em; }
thead th { border-bottom: 2px solid var(--ink); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; }
td small { display: block; color: var(--faint); font-size: 11.5px; }
td.best { background: var(--best); }
td.best b { color: var(--best-ink); }
td.clear { font-weight: 600; background: #eef4fb; }
td.clear small { font-weight: 400; }
ul.notes { margin: 12px 0 0; padding: 0; list-style: none; font-size: 13px; color: var(--faint); }
.plots { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(520px, 100%), 1fr));
  align-items: start; }
.plots img { width: 100%; height: auto; padding: 6px; border: 1px solid var(--line); border-radius: 8px;
  background: #fff; }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(600px, 100%), 1fr)); }
.card { min-width: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; }
.card header { display: flex; justify-content: space-between; gap: 12px; font-size: 13px; }
.card header span { color: var(--faint); white-space: nowrap; }
.card img { display: block; max-width: 100%; height: auto; margin: 8px auto; }
.card th, .card td { padding: 3px 8px; font-size: 12px; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 8px 22px; margin: 0; }
dl.facts dt { color: var(--faint); }
dl.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
pre { margin: 0; padding: 10px 12px; background: var(--back); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; }
@media print { body { background: #fff; } section { break-inside: avoid; border: 0; padding: 0; } }
</style>
</head>
<body>
<header><div><h1>$title</h1><ul class="chips">$facts</ul></div></header>
<main>
$sections
</main>
</body>
</html>
""")
