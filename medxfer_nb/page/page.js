// Light and dark, tables that sort, figures that enlarge. Everything on a report can be read without it.
(() => {
  'use strict';

  // Light and dark: as the system has it, until the reader chooses the other. The choice is kept; choosing what the system has forgets it.
  const root = document.documentElement, system = matchMedia('(prefers-color-scheme: dark)'), NAME = 'medxfer_nb-theme';
  const remembered = () => { try { return localStorage.getItem(NAME) } catch { return null } };
  const remember = theme => { try { theme ? localStorage.setItem(NAME, theme) : localStorage.removeItem(NAME) } catch { /* private window: for this page only */ } };
  const ofSystem = () => system.matches ? 'dark' : 'light';
  const choose = theme => theme ? root.dataset.theme = theme : delete root.dataset.theme;
  if (['light', 'dark'].includes(remembered())) choose(remembered()); // before anything is painted

  function themes() {
    const button = document.getElementById('theme');
    const tell = () => button.setAttribute('aria-pressed', (root.dataset.theme ?? ofSystem()) === 'dark');
    button.hidden = false;
    button.addEventListener('click', () => {
      const other = (root.dataset.theme ?? ofSystem()) === 'dark' ? 'light' : 'dark', theme = other === ofSystem() ? '' : other;
      choose(theme);
      remember(theme);
      tell();
    });
    system.addEventListener('change', tell);
    tell();
  }

  // What a cell is sorted by: [0, number], [1, text] or [2] for nothing, which comes last in both directions.
  const UNITS = { ms: 1e-3, s: 1, sec: 1, second: 1, seconds: 1, min: 60, minute: 60, minutes: 60, h: 3600, hour: 3600, hours: 3600, d: 86400, day: 86400, days: 86400, B: 1, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12 };
  const AMOUNT = `(\\d[\\d,]*(?:\\.\\d+)?)\\s*(${Object.keys(UNITS).sort((a, b) => b.length - a.length).join('|')})\\b`;
  const AMOUNTS = new RegExp(`^(?:about |[<>≤≥≈~]\\s*)?(?:${AMOUNT}\\s*)+$`);
  const NUMBER = /^(?:about |[<>≤≥≈~]\s*)?([+-]?\s?(?:\d[\d,]*)?(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?:%|[a-zµ]{1,9})?\s*(?:[±[(].*)?$/i; // 0.592 [0.5, 0.6]; 12 %; 1,234; 3.1 ± 0.2
  const value = digits => Number(digits.replace(/[,\s]/g, ''));

  function keyOf(cell) {
    const text = (cell.dataset.key ?? cell.textContent).trim().replace(/\u2212/g, '-').replace(/\s+/g, ' ');
    if (/^([-–—]?|nan|none|n\/a)$/i.test(text)) return [2];
    if (/^-?inf(inity)?$/i.test(text)) return [0, text.startsWith('-') ? -Infinity : Infinity];
    if (AMOUNTS.test(text)) return [0, [...text.matchAll(new RegExp(AMOUNT, 'g'))].reduce((sum, [, n, unit]) => sum + value(n) * UNITS[unit], 0)];
    const found = NUMBER.exec(text);
    return found && /\d/.test(found[1]) ? [0, value(found[1])] : [1, text];
  }

  const words = new Intl.Collator('en', { numeric: true });
  const compare = (a, b) => a[0] === 1 ? words.compare(a[1], b[1]) : a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0;

  function headings(table) { // of each column the lowest that is its alone
    const found = [], taken = [...table.tHead.rows].map(() => []);
    [...table.tHead.rows].forEach((row, r) => {
      let column = 0;
      for (const cell of row.cells) {
        while (taken[r][column]) column++;
        for (const line of taken.slice(r, r + cell.rowSpan)) for (let c = column; c < column + cell.colSpan; c++) line[c] = true;
        if (cell.colSpan === 1 && cell.textContent.trim()) found[column] = cell;
        column += cell.colSpan;
      }
    });
    return found;
  }

  function sortable(table) {
    const body = table.tBodies[0], first = body?.rows[0];
    if (!first || table.tBodies.length > 1) return;
    if (!table.tHead && [...first.cells].every(c => c.tagName === 'TH')) table.createTHead().append(first);
    const rows = [...body.rows];
    if (rows.length > 15) table.classList.add('long'); // too long to be kept on one sheet of paper
    if (!table.tHead || rows.length < 2 || rows.some(r => r.cells.length !== rows[0].cells.length || [...r.cells].some(c => c.colSpan > 1 || c.rowSpan > 1))) return;
    headings(table).forEach((heading, column) => {
      if (column >= rows[0].cells.length) return;
      const button = document.createElement('button');
      button.type = 'button';
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener('click', () => sort(table, heading, column, rows));
    });
  }

  function sort(table, heading, column, original) { // ascending, descending, and as it was; equal rows keep their order
    const next = { ascending: 'descending', descending: '' }[heading.getAttribute('aria-sort')] ?? 'ascending';
    table.querySelectorAll('[aria-sort]').forEach(h => h.removeAttribute('aria-sort'));
    if (!next) return table.tBodies[0].append(...original);
    heading.setAttribute('aria-sort', next);
    const sign = next === 'ascending' ? 1 : -1, keyed = [...table.tBodies[0].rows].map(row => [keyOf(row.cells[column]), row]);
    keyed.sort(([a], [b]) => a[0] - b[0] || sign * compare(a, b));
    table.tBodies[0].append(...keyed.map(([, row]) => row));
  }

  // Figures: each becomes a button that shows it as large as the window. Esc, the button and a click beside it close; focus returns.
  function figures() {
    const dialog = document.createElement('dialog'), large = new Image();
    dialog.innerHTML = '<form method="dialog"><button autofocus>Close</button></form><div class="wide" tabindex="0"></div>';
    dialog.lastChild.append(large);
    document.body.append(dialog);
    dialog.addEventListener('click', event => event.target === dialog && dialog.close());
    document.querySelectorAll('figure img').forEach(image => {
      const button = document.createElement('button');
      button.type = 'button';
      button.className = 'enlarge';
      button.title = 'Enlarge';
      button.setAttribute('aria-haspopup', 'dialog');
      image.replaceWith(button);
      button.append(image);
      button.addEventListener('click', () => {
        Object.assign(large, { src: image.src, alt: image.alt });
        dialog.setAttribute('aria-label', image.alt);
        dialog.showModal();
      });
    });
  }

  // What is wider than the page is scrolled within it, by keys too
  function scrolling() {
    const observer = new ResizeObserver(entries => entries.forEach(({ target }) => {
      if (target.scrollWidth > target.clientWidth) Object.entries({ tabindex: 0, role: 'group', 'aria-label': 'Table, scrolls sideways' }).forEach(([k, v]) => target.setAttribute(k, v));
      else ['tabindex', 'role', 'aria-label'].forEach(k => target.removeAttribute(k));
    }));
    document.querySelectorAll('main .wide').forEach(box => observer.observe(box));
  }

  // Paper has nothing to click on
  function printing() {
    let folded = [];
    addEventListener('beforeprint', () => { folded = [...document.querySelectorAll('details:not([open])')]; folded.forEach(d => d.open = true) });
    addEventListener('afterprint', () => folded.forEach(d => d.open = false));
  }

  addEventListener('DOMContentLoaded', () => {
    themes();
    document.querySelectorAll('main table').forEach(sortable);
    figures();
    scrolling();
    printing();
  });
})();
