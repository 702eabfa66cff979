'use strict'
// Every text of the record reaches the page as the text of a node, never as markup.
const $ = id => document.getElementById(id)
const el = (tag, props = {}, ...kids) => {
  const e = Object.assign(document.createElement(tag), props)
  e.append(...kids.filter(o => o != null))
  return e
}
const svg = (tag, attrs, ...kids) => {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag)
  for (const k in attrs) e.setAttribute(k, attrs[k])
  e.append(...kids)
  return e
}

// -- columns: deflated, base64, the bytes of all numbers by their place

async function unpack(id) {
  const text = atob($(id).textContent), bytes = new Uint8Array(text.length)
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i)
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))
  return new Uint8Array(await new Response(stream).arrayBuffer())
}
const decoded = bytes => new TextDecoder('utf-8', {ignoreBOM: true}).decode(bytes)
const unpackJson = async id => JSON.parse(decoded(await unpack(id)))

function joined(bytes, Kind) {
  const res = new Kind(bytes.length / Kind.BYTES_PER_ELEMENT), n = res.length
  for (let k = 0; k < Kind.BYTES_PER_ELEMENT; k++) for (let i = 0; i < n; i++) res[i] |= bytes[k * n + i] << 8 * k
  return res
}

// Scores come as codes of 16 bits, in the order of their values; 0 is nan.
const VALUE = new Float32Array(65536)
for (let code = 0; code < 65536; code++) {
  const up = code >> 15, bits = up ? code & 32767 : ~code & 32767, e = bits >> 10, f = bits & 1023
  VALUE[code] = (up ? 1 : -1) * (e == 31 ? f ? NaN : Infinity : e ? 2 ** (e - 25) * (1024 + f) : 2 ** -24 * f)
}
VALUE[0] = NaN

function startsOf(text) {
  const res = [0]
  for (let at = text.indexOf('\0'); at >= 0; at = text.indexOf('\0', at + 1)) res.push(at + 1)
  return Uint32Array.from(res)
}

class Names {
  constructor(bytes) {
    this.text = decoded(bytes)
    this.starts = startsOf(this.text)
    this.folded = this.text.normalize().toLowerCase()
    this.foldedStarts = this.folded.length == this.text.length ? this.starts : startsOf(this.folded)
  }
  of(i) { return this.text.slice(this.starts[i], this.starts[i + 1] - 1) }
  holding(query) {
    const q = query.normalize().toLowerCase(), starts = this.foldedStarts, hit = new Uint8Array(starts.length - 1)
    for (let at = this.folded.indexOf(q), i = 0; at >= 0; at = this.folded.indexOf(q, starts[i + 1])) {
      while (starts[i + 1] <= at) i++
      hit[i] = 1
    }
    return hit
  }
}

const MAKE = {score: o => joined(o, Uint16Array), class: o => joined(o, Int32Array), bytes: o => o, names: o => new Names(o)}
const columns = {}
const column = async c => c && (columns[c.id] ??= MAKE[c.kind](await unpack(c.id)))

// -- what is asked for

let META, S, drag = null
const show = {region: null, page: 0, down: true}
const PAGE = 25
const count = n => n.toLocaleString('en')
const told = v => Number.isNaN(v) ? '–' : !Number.isFinite(v) ? (v > 0 ? '∞' : '−∞') : Number.isInteger(v) ? String(v) : String(Number(v.toPrecision(3)))
const percent = p => Number.isNaN(p) ? '–' : p > .99 ? '> 99%' : p < .01 ? '< 1%' : `${Math.round(100 * p)}%`
const className = c => c < 0 ? null : META.classes ? META.classes[c] : String(c)
const nameOf = i => S.name ? S.name.of(i) : ''
const called = i => nameOf(i) || `item ${i}`
const short = i => called(i).startsWith(S.prefix) ? called(i).slice(S.prefix.length) : called(i)
const valued = (key, i) => S.data[key] ? VALUE[S.data[key][i]] : NaN
const sortCodes = key => ({'=targ': S.targ, '=likely': S.likely, '=item': null})[key] ?? S.data[key]
const between = (v, lo, hi) => v >= lo && v <= hi
const bound = (id, other) => $(id).value === '' ? other : $(id).valueAsNumber

async function need(...scores) { for (const o of scores) if (S.scored[o] && !S.data[o]) S.data[o] = await column(S.scored[o]) }

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => el('option', {value, textContent: text})))
  if (pairs.some(o => o[0] == chosen)) select.value = chosen
}

async function useSplit(at) {
  const m = META.splits[at], scores = m.scores.map(o => [o, o])
  S = {...m, mask: new Uint8Array(m.n), data: Object.create(null)}
  const kept = await Promise.all(['history_item', 'history_p', 'history_pred'].map(o => column(m.cols[o])))
  S.history = kept[0] && {row: new Map(Array.from(kept[0], (item, k) => [item, k])), p: kept[1], pred: kept[2]}
  S.pictures = new Map(m.pictures ? await unpackJson(m.pictures) : [])
  for (const o of ['name', 'targ', 'likely']) S[o] = await column(m.cols[o])
  await need('p_wrong')
  for (const o of ['targ', 'likely']) {
    const there = S[o] ? [...new Set(S[o])].filter(c => c >= 0).sort((a, b) => a - b) : []
    options($(o), [['', 'any'], ...there.map(c => [c, className(c)])], $(o).value)
  }
  options($('by'), [['', 'any'], ...scores], $('by').value)
  for (const [id, first] of [['x', 'variability'], ['y', 'confidence']])
    options($(id), scores, m.scores.includes($(id).value) ? $(id).value : m.scores.includes(first) ? first : m.scores[0])
  options($('sort'), [...scores, ['=targ', 'label'], ['=likely', 'likely class'], ['=item', 'item number']], $('sort').value || m.first)
  show.region = null
  await refresh()
}

function sortedBy(codes, kept, down) { // counting sort; what has no value comes last
  if (!codes) return down ? kept.reverse() : kept
  const n = kept.length, none = codes instanceof Int32Array ? -1 : 0, at = new Uint32Array(n), res = new Uint32Array(n)
  let most = 0
  for (let k = 0; k < n; k++) if (codes[kept[k]] > most) most = codes[kept[k]]
  const starts = new Uint32Array(most + 3)
  for (let k = 0; k < n; k++) {
    const c = codes[kept[k]]
    starts[(at[k] = c <= none ? most + 1 : down ? most - c : c) + 1]++
  }
  for (let k = 1; k < starts.length; k++) starts[k] += starts[k - 1]
  for (let k = 0; k < n; k++) res[starts[at[k]]++] = kept[k]
  return res
}

function inside(poly, x, y) {
  let res = false
  for (let i = 0, j = poly.length - 1; i < poly.length; j = i++) {
    const [a, b] = poly[i], [c, d] = poly[j]
    if (b > y != d > y && x < (c - a) * (y - b) / (d - b) + a) res = !res
  }
  return res
}

function filter() {
  const {n, mask, targ, likely, marked} = S, query = $('search').value.trim()
  const hit = query && S.name ? S.name.holding(query) : new Uint8Array(query ? n : 0)
  if (/^#?\d+$/.test(query)) { const i = Number(query.replace('#', '')); if (i < n) hit[i] = 1 }
  const [t, l] = ['targ', 'likely'].map(o => $(o).value === '' ? null : Number($(o).value)), by = S.data[$('by').value], alone = $('marked').checked
  const lo = bound('by-min', -Infinity), hi = bound('by-max', Infinity), x = S.data[$('x').value], y = S.data[$('y').value]
  const ends = ['x-min', 'x-max', 'y-min', 'y-max'].map((o, k) => bound(o, k % 2 ? Infinity : -Infinity))
  const ranged = ends.some(Number.isFinite), poly = show.region
  for (let i = 0; i < n; i++) {
    mask[i] = (!query || hit[i]) && (t === null || targ[i] === t) && (l === null || likely[i] === l) && (!alone || marked[i])
      && (!by || between(VALUE[by[i]], lo, hi))
    if (!mask[i] || !(ranged || poly)) continue
    const a = VALUE[x[i]], b = VALUE[y[i]]
    mask[i] = between(a, ends[0], ends[1]) && between(b, ends[2], ends[3]) && (!poly || inside(poly, a, b))
  }
  let k = 0
  const kept = new Uint32Array(n)
  for (let i = 0; i < n; i++) if (mask[i]) kept[k++] = i
  return kept.slice(0, k)
}

async function refresh() {
  const mine = S
  await need($('by').value, $('x').value, $('y').value, $('sort').value)
  if (mine != S) return
  S.marked ??= Uint8Array.from({length: S.n}, (_, i) => !S.flagged && S.targ && S.targ[i] >= 0 && S.likely[i] != S.targ[i])
  for (const i of S.flagged ?? []) S.marked[i] = 1
  S.kept = filter()
  S.order = sortedBy(sortCodes($('sort').value), S.kept.slice(), show.down)
  show.page = 0
  $('status').textContent = `${count(S.kept.length)} of ${count(S.n)} items${elsewhere()}`
  $('download').disabled = !S.kept.length
  $('turn').textContent = show.down ? 'largest first' : 'smallest first'
  draw()
  list()
}

function elsewhere() {
  const others = META.splits.filter(o => o.split != S.split).map(o => o.split)
  return !S.kept.length && $('search').value.trim() && others.length ? `; the other splits (${others.join(', ')}) are searched when they are chosen above` : ''
}

// -- the map: every item that is chosen, none left out

const MARGIN = {left: 46, right: 10, top: 22, bottom: 34}
const LOOK = {} // colours and the size of the map, read when they change: reading them makes a browser lay out the page
function look() {
  const style = getComputedStyle(document.documentElement)
  for (const o of ['grey', 'blue', 'orange', 'soft', 'ink', 'paper']) LOOK[o] = style.getPropertyValue('--' + o).trim()
  LOOK.box = $('map').getBoundingClientRect()
}
const rgb = name => { const h = LOOK[name].slice(1), f = h.length == 3 ? [...h].map(o => o + o) : h.match(/../g); return f.map(o => parseInt(o, 16)) }

function extent(codes) {
  let lo = Infinity, hi = -Infinity
  for (const c of codes) { const v = VALUE[c]; if (Number.isFinite(v)) { if (v < lo) lo = v; if (v > hi) hi = v } }
  if (lo > hi) return [0, 1]
  if (lo >= 0 && hi <= 1 && hi > .3) return [0, hi > .5 ? 1 : .5]
  return lo == hi ? [lo - .5, hi + .5] : [lo, hi]
}

function place() { // where each item lies on the canvas, in its pixels; −1: nowhere
  const canvas = $('map'), {box} = LOOK, ratio = window.devicePixelRatio || 1, key = [$('x').value, $('y').value, box.width, box.height, ratio].join()
  if (S.placed == key) return
  canvas.width = Math.max(1, Math.round(box.width * ratio)), canvas.height = Math.max(1, Math.round(box.height * ratio))
  const x = S.data[$('x').value], y = S.data[$('y').value], ends = [extent(x), extent(y)], m = MARGIN
  const w = canvas.width - (m.left + m.right) * ratio, h = canvas.height - (m.top + m.bottom) * ratio
  const clamp = v => v < 0 ? 0 : v > 1 ? 1 : v, scale = new Float32Array(65536), scaleY = new Float32Array(65536)
  for (let c = 0; c < 65536; c++) {
    scale[c] = m.left * ratio + w * clamp((VALUE[c] - ends[0][0]) / (ends[0][1] - ends[0][0]))
    scaleY[c] = m.top * ratio + h * (1 - clamp((VALUE[c] - ends[1][0]) / (ends[1][1] - ends[1][0])))
  }
  const px = new Int16Array(S.n), py = new Int16Array(S.n)
  let nowhere = 0
  for (let i = 0; i < S.n; i++) {
    if (x[i] && y[i]) px[i] = scale[x[i]], py[i] = scaleY[y[i]]
    else px[i] = -1, nowhere++
  }
  Object.assign(S, {placed: key, px, py, ends, ratio, nowhere})
}

function dot(side) { // the pixels of a dot
  const res = [], middle = (side - 1) / 2
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++)
    if ((x - middle) ** 2 + (y - middle) ** 2 <= side ** 2 / 4 + .3) res.push([x - Math.round(middle), y - Math.round(middle)])
  return res
}

function draw() {
  if (!S.scores.length) return
  place()
  const canvas = $('map'), ctx = canvas.getContext('2d', {willReadFrequently: true}), W = canvas.width, H = canvas.height, {px, py, mask, marked, n, ratio} = S
  const side = Math.round(ratio * (n < 3000 ? 6 : n < 30000 ? 4 : n < 200000 ? 2 : 1)), all = S.kept.length == n
  const stamp = Int32Array.from(dot(side), ([dx, dy]) => dy * W + dx), image = ctx.createImageData(W, H), out = new Uint32Array(image.data.buffer)
  const layers = ['grey', 'blue', 'orange'].map(name => ({colour: rgb(name), counts: new Uint32Array(W * H), most: 1}))
  for (let i = 0; i < n; i++) {
    if (px[i] < 0) continue
    const layer = layers[mask[i] ? 1 + marked[i] : 0], counts = layer.counts, at = py[i] * W + px[i]
    for (let k = 0; k < stamp.length; k++) if (++counts[at + stamp[k]] > layer.most) layer.most = counts[at + stamp[k]]
  }
  for (const {colour: [r, g, b], counts, most} of layers) { // those above cover those below
    const full = Math.log1p(most), rgb = b << 16 | g << 8 | r
    for (let at = 0; at < counts.length; at++)
      if (counts[at]) out[at] = (most == 1 ? 230 : 102 + 153 * Math.log1p(counts[at]) / full) << 24 | rgb
  }
  ctx.putImageData(image, 0, 0)
  axes(ctx)
  const drawn = n - S.nowhere
  const what = S.flagged ? 'labels that the verdict flags' : 'items whose likely class is not their label'
  $('drawn').textContent = `All ${count(drawn)} items of ${S.split} are drawn, none left out; a stronger colour means more items on one spot. Orange: ${what}.`
    + (all ? '' : ' Grey: not chosen.') + (S.nowhere ? ` ${count(S.nowhere)} items do not have both scores and have no place here.` : '')
  canvas.setAttribute('aria-label', `${$('y').value} against ${$('x').value} of ${count(drawn)} items; the fields below choose a region, the table lists the items in it`)
}

function axes(ctx) {
  const {ends, ratio} = S, m = MARGIN, {box} = LOOK, text = (o, x, y, align, base) => { ctx.textAlign = align; ctx.textBaseline = base; ctx.fillText(o, x, y) }
  ctx.save()
  ctx.scale(ratio, ratio)
  ctx.font = '12px system-ui, sans-serif'
  ctx.fillStyle = ctx.strokeStyle = LOOK.soft
  const x0 = m.left - 4, y1 = box.height - m.bottom + 4, x1 = box.width - m.right, y0 = m.top
  ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x0, y1); ctx.lineTo(x1, y1); ctx.stroke()
  for (const f of [0, .5, 1]) {
    const at = k => told(ends[k][0] + f * (ends[k][1] - ends[k][0]))
    text(at(0), m.left + f * (x1 - m.left), y1 + 4, f ? f == 1 ? 'right' : 'center' : 'left', 'top')
    text(at(1), x0 - 4, y0 + (1 - f) * (y1 - 4 - y0), 'right', f == 1 ? 'top' : 'middle')
  }
  text(`${$('x').value} →`, m.left + .75 * (x1 - m.left), y1 + 4, 'center', 'top')
  text(`↑ ${$('y').value}`, 4, 4, 'left', 'top')
  if ($('x').value == 'variability' && $('y').value == 'confidence') {
    ctx.fillStyle = LOOK.ink
    for (const [o, x, y, align] of [['easy', m.left + 6, y0 + 8, 'left'], ['hard', m.left + 6, y1 - 14, 'left'], ['ambiguous', x1 - 4, (y0 + y1) / 2, 'right']]) {
      ctx.strokeStyle = LOOK.paper; ctx.lineWidth = 3; ctx.textAlign = align; ctx.textBaseline = 'middle'
      ctx.strokeText(o, x, y); ctx.fillText(o, x, y)
    }
  }
  ctx.restore()
}

function atData(x, y) { // from the page's pixels on the canvas to scores
  const {box} = LOOK, m = MARGIN, [a, b] = S.ends
  return [a[0] + (x - m.left) / (box.width - m.left - m.right) * (a[1] - a[0]), b[1] - (y - m.top) / (box.height - m.top - m.bottom) * (b[1] - b[0])]
}

function brushed() { // the corners of what is dragged, on the canvas
  const [p, q] = [drag[0], drag.at(-1)]
  return document.forms.axes.how.value == 'lasso' ? drag : [p, [q[0], p[1]], q, [p[0], q[1]]]
}

function choose() {
  const poly = brushed().map(o => atData(...o)), lasso = document.forms.axes.how.value == 'lasso'
  show.region = lasso ? poly : null
  for (const [k, o] of ['x', 'y'].entries()) {
    const v = poly.map(p => p[k]), ends = S.ends[k], lo = Math.min(...v), hi = Math.max(...v)
    $(o + '-min').value = lasso || lo <= ends[0] ? '' : told(lo) // beyond the edge: no bound, so that ∞ is in it
    $(o + '-max').value = lasso || hi >= ends[1] ? '' : told(hi)
  }
  return refresh()
}

function clearRegion() {
  show.region = null
  for (const o of ['x-min', 'x-max', 'y-min', 'y-max']) $(o).value = ''
  $('brush').replaceChildren()
}

function nearest(x, y) {
  const {px, py, kept, ratio} = S
  let best = -1, least = (8 * ratio) ** 2 + 1
  for (const i of kept) if (px[i] >= 0) {
    const d = (px[i] - x * ratio) ** 2 + (py[i] - y * ratio) ** 2
    if (d < least) least = d, best = i
  }
  return best
}

// -- items

function picture(i) {
  const p = S.pictures.get(i)
  if (!p) return null
  return p.startsWith('data:image/') ? el('img', {className: 'pic', src: p, alt: ''}) : el('div', {className: 'words clip', textContent: p})
}

const labelled = i => {
  const t = className(S.targ ? S.targ[i] : -1), l = className(S.likely ? S.likely[i] : -1)
  return [t, t != null && l != null && S.likely[i] != S.targ[i] ? l : null]
}

function history(i) { // epoch, probability of the label, predicted class
  const k = S.history?.row.get(i), n = S.epochs.length
  if (k == null) return []
  return S.epochs.map((e, j) => ({epoch: e, p: S.history.p[k * n + j], pred: S.history.pred[k * n + j]})).filter(o => o.p < 255).map(o => ({...o, p: o.p / 250}))
}

function curve(rows) {
  const x = o => 30 + 220 * (rows.length > 1 ? (o.epoch - rows[0].epoch) / (rows.at(-1).epoch - rows[0].epoch) : .5), y = o => 62 - 54 * o.p
  const dots = rows.map(o => svg('circle', {cx: x(o), cy: y(o), r: 2, fill: 'var(--blue)'}))
  const label = (o, x, y, anchor) => svg('text', {x, y, 'text-anchor': anchor}, o)
  return svg('svg', {viewBox: '0 0 260 84', role: 'img', 'aria-label': 'probability of the label, epoch by epoch'},
    svg('path', {d: 'M30 8V62H250', fill: 'none', stroke: 'var(--line)'}), label('1', 24, 12, 'end'), label('0', 24, 64, 'end'),
    label(`epoch ${rows[0].epoch}`, 30, 78, 'start'), label(String(rows.at(-1).epoch), 250, 78, 'end'),
    svg('polyline', {points: rows.map(o => `${x(o)},${y(o)}`).join(' '), fill: 'none', stroke: 'var(--blue)', 'stroke-width': 1.5}), ...dots)
}

function card(i, whole) {
  const [targ, likely] = labelled(i), rows = history(i), p = valued('p_wrong', i), axis = ['y', 'x'].map(o => $(o).value)
  const facts = whole ? S.scores : axis
  const res = [el('b', {className: whole ? '' : 'clip', textContent: whole ? called(i) : short(i)}), picture(i),
    el('p', {}, 'item ' + i + (targ == null ? '' : ', label '), targ == null ? null : el('span', {textContent: targ}),
      likely == null ? null : ' → ', likely == null ? null : el('span', {className: 'other', textContent: likely})),
    Number.isNaN(p) ? null : el('p', {textContent: `wrong with a probability of ${percent(p)}`}),
    el('p', {className: 'soft', textContent: facts.map(o => `${o} ${told(valued(o, i))}`).join(', ')}),
    rows.length ? el('p', {className: 'soft', textContent: 'probability of the label, epoch by epoch'}) : el('p', {className: 'soft', textContent: S.no_history}),
    rows.length ? curve(rows) : null]
  if (whole && rows.length) res.push(el('table', {}, el('thead', {}, el('tr', {}, ...['epoch', 'probability', 'predicted'].map(o => el('th', {textContent: o})))),
    el('tbody', {}, ...rows.map(o => el('tr', {}, ...[o.epoch, told(o.p), className(o.pred) ?? '–'].map(v => el('td', {textContent: v})))))))
  return res.filter(o => o != null)
}

async function detail(i) {
  await need(...S.scores)
  $('detail').querySelector('.card').replaceChildren(...card(i, true))
  $('detail').showModal()
}

function sortButton(key, text, number) {
  const th = el('th', {scope: 'col', className: number ? 'n' : ''}, key ? el('button', {type: 'button', textContent: text, onclick: () => sortOn(key)}) : text)
  if (key && key == $('sort').value) th.setAttribute('aria-sort', show.down ? 'descending' : 'ascending')
  return th
}

function sortOn(key) {
  show.down = key == $('sort').value ? !show.down : true
  $('sort').value = key
  return refresh()
}

function list() {
  const sort = $('sort').value, extra = S.scores.includes(sort) && sort != 'p_wrong' ? sort : null, last = Math.max(0, Math.ceil(S.order.length / PAGE) - 1)
  const heads = [[null, ''], ['=item', 'item'], ['=targ', 'label'], ['=likely', 'likely class']]
  if (S.data.p_wrong) heads.push(['p_wrong', 'wrong?', true])
  if (extra) heads.push([extra, extra, true])
  document.querySelector('#items thead tr').replaceChildren(...heads.map(o => sortButton(...o)))
  const td = (k, ...kids) => { const e = el('td', {className: heads[k][2] ? 'n' : ''}, ...kids); e.dataset.label = heads[k][1]; return e }
  const rows = Array.from(S.order.slice(show.page * PAGE, (show.page + 1) * PAGE), i => {
    const [targ, likely] = labelled(i), span = o => el('span', {className: 'clip', textContent: o ?? '–'})
    const numbers = heads.slice(4).map(([key], k) => td(4 + k, key == 'p_wrong' ? percent(valued(key, i)) : told(valued(key, i))))
    return el('tr', {}, td(0, picture(i)), td(1, el('button', {type: 'button', className: 'open', onclick: () => detail(i)}, span(short(i)))),
      td(2, span(targ)), td(3, likely == null ? span(className(S.likely ? S.likely[i] : -1)) : el('span', {className: 'clip other', textContent: likely})), ...numbers)
  })
  document.querySelector('#items tbody').replaceChildren(...rows)
  $('page').textContent = S.order.length ? `${count(show.page * PAGE + 1)} to ${count(Math.min(S.order.length, (show.page + 1) * PAGE))} of ${count(S.order.length)}` : 'no item'
  $('back').disabled = show.page == 0
  $('next').disabled = show.page >= last
}

const quoted = o => /[",\r\n]|^\s|\s$/.test(o) ? `"${o.replaceAll('"', '""')}"` : o
const inCsv = v => Number.isNaN(v) ? '' : Number.isFinite(v) ? String(Number(v.toPrecision(4))) : v > 0 ? 'inf' : '-inf'

async function download() {
  await need(...S.scores)
  const parts = [['item', 'name', 'split', 'targ', 'likely', ...S.scores].join() + '\n']
  const name = o => quoted(o ?? ''), split = quoted(S.split)
  for (let k = 0; k < S.order.length; k += 5000) parts.push(Array.from(S.order.slice(k, k + 5000), i =>
    [i, name(nameOf(i)), split, name(className(S.targ ? S.targ[i] : -1)), name(className(S.likely ? S.likely[i] : -1)), ...S.scores.map(o => inCsv(valued(o, i)))].join() + '\n').join(''))
  const url = URL.createObjectURL(new Blob(parts, {type: 'text/csv'}))
  el('a', {href: url, download: `${META.title}-${S.split}.csv`.replace(/[^\w.-]+/g, '_')}).click()
  setTimeout(() => URL.revokeObjectURL(url), 60000)
}

// -- hands

function listen() {
  const canvas = $('map'), tip = $('tip'), at = e => { const b = canvas.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top] }
  let soon, asked = false
  $('search').oninput = () => { clearTimeout(soon); soon = setTimeout(refresh, 120) }
  for (const o of ['targ', 'likely', 'by', 'by-min', 'by-max', 'marked', 'sort']) $(o).onchange = refresh
  for (const o of ['x-min', 'x-max', 'y-min', 'y-max']) $(o).onchange = () => { show.region = null; $('brush').replaceChildren(); refresh() }
  for (const o of ['x', 'y']) $(o).onchange = () => { clearRegion(); refresh() }
  for (const o of ['filters', 'axes']) $(o).onsubmit = e => { e.preventDefault(); refresh() }
  $('split').onchange = () => { clearRegion(); useSplit($('split').selectedIndex) }
  $('clear').onclick = () => { $('filters').querySelectorAll('input').forEach(o => o.type == 'checkbox' ? o.checked = false : o.value = ''); for (const o of ['targ', 'likely', 'by']) $(o).value = ''; clearRegion(); refresh() }
  $('turn').onclick = () => sortOn($('sort').value)
  $('back').onclick = () => { show.page--; list() }
  $('next').onclick = () => { show.page++; list() }
  $('download').onclick = download
  canvas.onpointerdown = e => { canvas.setPointerCapture(e.pointerId); drag = [at(e)]; tip.hidden = true; clearRegion() }
  canvas.onpointermove = e => {
    if (drag) { drag.push(at(e)); return $('brush').replaceChildren(svg('polygon', {points: brushed().join(' ')})) }
    if (asked) return
    asked = true
    requestAnimationFrame(() => { asked = false; hover(...at(e), e) })
  }
  canvas.onpointerup = async e => {
    if (!drag) return
    const [a, b] = drag[0], moved = drag.some(([x, y]) => Math.hypot(x - a, y - b) > 4), i = moved ? -1 : nearest(a, b)
    const done = moved ? choose() : refresh()
    drag = null
    await done
    if (i >= 0) detail(i)
  }
  canvas.onpointercancel = () => { drag = null; clearRegion() }
  canvas.onpointerleave = () => { tip.hidden = true }
  new ResizeObserver(() => { look(); $('brush').replaceChildren(); if (S?.kept) draw() }).observe(canvas)
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { look(); if (S?.kept) draw() })
}

function hover(x, y, e) {
  const tip = $('tip'), i = drag ? -1 : nearest(x, y)
  tip.hidden = i < 0
  if (i < 0) return
  tip.replaceChildren(...card(i, false))
  tip.style.left = `${Math.max(4, Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`
  tip.style.top = `${Math.max(4, Math.min(e.clientY + 14, innerHeight - tip.offsetHeight - 8))}px`
}

async function start() {
  META = await unpackJson('meta')
  options($('split'), META.splits.map(o => [o.split, o.split]))
  $('tool').hidden = false
  look()
  listen()
  await useSplit(0)
  $('wait').remove()
  document.documentElement.dataset.ready = ''
}
start().catch(e => { $('wait').textContent = `This browser could not unpack the items (${e.message}); a newer one can. What else is on the page stands as it is.`; throw e })
