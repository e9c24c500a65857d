"""The page's one style sheet: dark on light, one column on a telephone, black on white in print."""

CSS = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #555; --line: #d6d6d6; --tint: #f5f6f8;
  --mark: #0072b2; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem 1rem 4rem; color: var(--ink);
  background: #fff; font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .5rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul, ol, dl { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.08rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
a { color: var(--mark); }
nav { margin: .8rem 0 0; }
nav a { margin-right: 1rem; white-space: nowrap; }
code, pre { font: .84rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--tint); border-left: 3px solid var(--line); padding: .6rem .8rem;
  overflow-x: auto; margin: .4rem 0 1rem; overflow-wrap: normal; }
.scroll { overflow-x: auto; margin: .8rem 0 .4rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; padding: 0 0 .3rem; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; white-space: normal; border-bottom: 2px solid var(--ink);
  font-weight: 600; min-width: 4rem; }
th:first-child, td.text, thead th.text { text-align: left; }
tbody th { font-weight: 500; }
.cards tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 18rem; }
tr.strong { background: var(--tint); }
.layers tbody th { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .8rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 1.6rem 2rem; align-items: start; margin: 1rem 0; }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; max-width: 38rem; height: auto; display: block; }
figure h4 { margin: 0 0 .3rem; font-size: 1rem; }
.proof { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 0 2.5rem; }
.proof h4 { margin: .8rem 0 .2rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1.2rem; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 40rem) {
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  body { padding: .9rem .8rem 3rem; }
  dl { display: block; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  .cards, .cards tbody, .cards caption { display: block; }
  .cards tr { display: block; border: 1px solid var(--line); border-radius: .4rem;
    margin: 0 0 .7rem; padding: .4rem .7rem; }
  .cards tbody th, .cards td { max-width: none; }
  .cards th, .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: .12rem 0; white-space: normal; }
  .cards tbody th { font-weight: 700; font-size: 1rem; }
  .cards td::before { content: attr(data-label); color: var(--soft); text-align: left; }
  .layers tbody th { position: sticky; left: 0; background: #fff; min-width: 44vw;
    white-space: normal; overflow-wrap: anywhere; font-size: .72rem; }
}
@media print {
  @page { margin: 16mm 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  a { color: inherit; text-decoration: none; }
  h2, h3, h4 { break-after: avoid; }
  .scroll { overflow: visible; }
  pre { white-space: pre-wrap; border: 1px solid #999; break-inside: avoid; }
  table { font-size: 8pt; }
  th, td { padding: .15rem .35rem; white-space: normal; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; gap: 6mm; }
  tr.strong { background: none; font-weight: 600; }
}
"""
