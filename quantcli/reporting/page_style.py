"""The style sheet of a report's page, with places for the colours of light and dark."""

STYLE = """
:root { color-scheme: light dark; %(light)s --good: #1a6b33; --bad: #b3261e; --warn: #8a5a00; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { %(dark)s --good: #56c26e; --bad: #ff8a80; --warn: #e3b341; --card: #1d232a; }
}
* { box-sizing: border-box; }
body { margin: 2rem auto; padding: 0 1rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: 0.5rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
code, pre { font: 0.85rem/1.5 ui-monospace, monospace; }
.asked { margin: 0 0 1rem; }
.asked code { display: block; padding: 0.5rem 0.75rem; border-radius: 0.4rem; background: var(--card);
  overflow-wrap: anywhere; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.75rem; margin: 1rem 0; }
.headline div { padding: 0.6rem 0.9rem; border-radius: 0.4rem; background: var(--card); }
.headline dt { font-size: 0.8rem; opacity: 0.8; overflow-wrap: anywhere; }
.headline dd { margin: 0; font-size: 0.8rem; overflow-wrap: anywhere; }
.headline strong { display: block; font-size: 1.25rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--faint); text-align: left; vertical-align: top; }
thead th { white-space: nowrap; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bars { min-width: 6rem; vertical-align: middle; }
.bar { display: block; height: 0.7rem; border-radius: 0.15rem; background: var(--best); }
.note, figcaption { font-size: 0.85rem; opacity: 0.8; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%%); white-space: nowrap; }
caption.unseen { display: block; }
.passed { color: var(--good); }
.failed { color: var(--bad); font-weight: bold; }
.warnings { border-left: 0.25rem solid var(--warn); padding-left: 1rem; }
.warnings h2 { color: var(--warn); }
figure { margin: 0; }
figcaption { margin: 0.25rem 0 0.5rem; }
svg { display: block; width: 100%%; max-width: 52rem; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
summary { cursor: pointer; width: fit-content; font-size: 0.9rem; }
details[open] > summary { margin-bottom: 0.5rem; }
pre { overflow-x: auto; padding: 0.75rem; border-radius: 0.4rem; background: var(--card); }
footer { margin-top: 3rem; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; }
  .plot { overflow-x: auto; }
  .plot svg { min-width: 34rem; }
  th, td { padding: 0.3rem 0.5rem; }
}
@media print {
  :root { color-scheme: light; %(light)s --good: #1a6b33; --bad: #b3261e; --warn: #8a5a00; --card: #f4f6f8; }
  body { margin: 0; max-width: none; font-size: 10pt; }
  figure, tr, .headline div { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide, pre { overflow: visible; white-space: pre-wrap; overflow-wrap: anywhere; }
  .bar, .asked code, .headline div { print-color-adjust: exact; }
  .short::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
