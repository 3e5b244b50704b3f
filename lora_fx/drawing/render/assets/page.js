"use strict";
(() => {
  performance.mark("viewer:start");

  const SVG = "http://www.w3.org/2000/svg";
  const MOST_ELEMENTS = 1500; // in the drawing, whatever the size of the graph
  const ROOT = "g0";
  const STATUSES = ["added", "removed", "rewired", "changed", "same"];
  const MARKS = { added: "+", removed: "−", rewired: "⇄", changed: "~", same: "" };
  const SAMPLES = { ...MARKS, same: " " };

  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("description").textContent);
  const nodes = data.nodes ?? [];
  const groups = data.groups ?? [];
  const sites = data.sites ?? [];
  const changes = data.changes ?? [];
  const svg = byId("drawing");
  const stage = byId("stage");

  const open = new Set([ROOT, ...(data.open ?? []), ...(data.root ? [data.root] : [])]);
  const off = new Set(); // statuses that are dimmed
  const view = { x: 0, y: 0, k: 1 }; // screen = world * k + (x, y)
  const size = { w: 0, h: 0 }; // of the stage
  let selected = null; // id of a node, a group or a stub
  let near = null; // what is within some hops of a change, or null for everything
  let changeAt = -1; // position in changes

  // ---------------------------------------------------------------- The description

  const isStub = (id) => id.includes("/");
  const isGroup = (id) => id[0] === "g" && !isStub(id);
  const numberOf = (id) => Number(id.slice(1));
  const nodeOf = (id) => nodes[numberOf(id)];
  const groupOf = (id) => groups[numberOf(id)];

  /** The stubs of a group; what is read for several reasons from one source is one pill, with one edge to a reader. */
  function stubsOf(id) {
    const group = groupOf(id);
    if (!group.pills) {
      const bySource = new Map();
      group.pills = [];
      for (const { source, to, status, shared, called } of group.stubs ?? []) {
        const known = shared ? undefined : bySource.get(source);
        const stub = known ?? { source, shared, called, readers: new Map() };
        for (const reader of to) stub.readers.set(reader, stub.readers.has(reader) ? "same" : status);
        if (!known) group.pills.push(stub);
        if (!shared) bySource.set(source, stub);
      }
    }
    return group.pills;
  }

  /** What the model's code calls the value where it is read, or else the name of its operator. */
  const stubName = ({ source, called }) => called ?? nodeOf(source).name;

  /** The stub of an id such as "g7/2": the third of g7. */
  function stubOf(id) {
    const [group, position] = id.split("/");
    return stubsOf(group)[Number(position)];
  }

  /** The group directly around a node, group or stub; undefined for the root. */
  function parentOf(id) {
    if (isStub(id)) return id.split("/")[0];
    return isGroup(id) ? groupOf(id).parent : nodeOf(id).group;
  }

  /** The groups around something, from the innermost to the root. */
  function around(id) {
    const found = [];
    for (let group = parentOf(id); group !== undefined; group = parentOf(group)) found.push(group);
    return found;
  }

  /** The status of a node, or of a group all of whose nodes are added or all removed. */
  function statusOf(id) {
    if (isStub(id)) return nodeOf(stubOf(id).source).status;
    if (!isGroup(id)) return nodeOf(id).status;
    const { nodes: total, added, removed } = groupOf(id).counts;
    if (total && added === total) return "added";
    return total && removed === total ? "removed" : "same";
  }

  /** How many nodes of a status a group has. */
  function countOf(group, status) {
    const { nodes: total, added = 0, removed = 0, rewired = 0, changed = 0 } = group.counts;
    return status === "same" ? total - added - removed - rewired - changed : group.counts[status] ?? 0;
  }

  /** The users of every node, made at first use. */
  const usersOf = lazily(() => {
    const users = nodes.map(() => []);
    nodes.forEach((node, number) => (node.inputs ?? []).forEach((read) => users[numberOf(read)].push(`n${number}`)));
    return users;
  });

  function lazily(make) {
    let made = null;
    return () => (made ??= make());
  }

  // ---------------------------------------------------------------- Text

  const LABEL = { size: 13, weight: 600, line: 18 };
  const PLAIN = { size: 11, weight: 400, line: 15 };
  const SMALL = { size: 10, weight: 400, line: 14 };
  const WIDEST = 230; // of a line in a box
  const LEAST = 5; // pixels, below which text is left out
  const GROWN = 1.6; // by how much a label grows where it is the only text that can be read

  const family = getComputedStyle(document.body).fontFamily;
  const ruler = document.createElement("canvas").getContext("2d");
  const widths = new Map();

  /** Text with its control, direction and other invisible characters written out, so that it shows what it is. */
  function visible(text) {
    return String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\ufffe\uffff]/gu, (letter) => {
      if (letter === "\n") return "\\n";
      if (letter === "\t") return "\\t";
      return `\\u${letter.codePointAt(0).toString(16).padStart(4, "0")}`;
    });
  }

  function measure(text, font) {
    const key = `${font.size} ${text}`;
    let width = widths.get(key);
    if (width === undefined) {
      ruler.font = `${font.weight} ${font.size}px ${family}`;
      ruler.textRendering = "geometricPrecision";
      widths.set(key, (width = ruler.measureText(text).width));
    }
    return width;
  }

  /** The longest beginning of a text that fits, with an ellipsis where something was cut. */
  function cut(text, width, font) {
    const start = text.slice(0, 300);
    if (start === text && measure(text, font) <= width) return text;
    const letters = Array.from(start);
    let [low, high] = [0, letters.length];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (measure(`${letters.slice(0, middle).join("")}…`, font) <= width) low = middle;
      else high = middle - 1;
    }
    return `${letters.slice(0, low).join("").trimEnd()}…`;
  }

  const marked = (status, text) => (MARKS[status] ? `${MARKS[status]} ${text}` : text);
  const shapeOf = (value) => (value ?? "").replace(/^[\w.]+ (?=\[)/, "");
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  /** What a node is called in its box. */
  function labelOf(node) {
    return node.part && node.part !== node.label ? `${node.part} · ${node.label}` : node.label;
  }

  /** The name of anything, in one line. */
  function titleOf(id) {
    if (isStub(id)) return stubName(stubOf(id));
    return marked(statusOf(id), isGroup(id) ? groupOf(id).name : labelOf(nodeOf(id)));
  }

  /** All that the tooltip says. */
  function tooltipOf(id) {
    if (isStub(id)) return `from outside: ${visible(nodeOf(stubOf(id).source).name)}`;
    const about = isGroup(id) ? groupOf(id) : nodeOf(id);
    const weights = (about.weights ?? []).map((weight) => weight.name);
    const status = statusOf(id) === "same" ? undefined : statusOf(id);
    const parts = [about.name, about.op, about.type, about.note, status, about.value, ...weights, about.path];
    return parts.filter((part) => part).map(visible).join("\n");
  }

  // ---------------------------------------------------------------- Faces: what stands in a closed box, and its size

  const PAD = 12;
  const TURN = 16; // width that the triangle takes
  const HEADER = 32; // of an open group
  const INSET = 18; // around the inside of an open group
  const STACK = 8; // by how much the cards of a repeat stand out
  const GAP = 8; // between the parts of a line
  const faces = new Map();

  function faceOf(id) {
    let face = faces.get(id);
    if (!face) {
      if (isStub(id)) face = stubFace(stubOf(id));
      else face = isGroup(id) ? groupFace(id) : nodeFace(nodeOf(id));
      faces.set(id, face);
    }
    return face;
  }

  function lineOf(text, font, look = "", widest = WIDEST) {
    const shown = cut(visible(text), widest, font);
    return { text: shown, font, look, width: measure(shown, font) };
  }

  function faceFrom(lines, indent = 0, extra = 0) {
    const width = Math.max(32, ...lines.map((line) => line.width)) + 2 * PAD + indent + extra;
    const height = lines.reduce((sum, line) => sum + line.font.line, 0) + 14 + extra;
    return { lines, w: Math.ceil(width / 8) * 8, h: Math.ceil(height) };
  }

  function nodeFace(node) {
    const weights = node.weights ?? [];
    const lines = [lineOf(marked(node.status, labelOf(node)), LABEL, node.status)];
    for (const weight of weights.slice(0, 2)) lines.push(lineOf(`${weight.short} ${shapeOf(weight.value)}`, PLAIN));
    if (weights.length > 2) lines.push(lineOf(`and ${weights.length - 2} more`, PLAIN, "muted"));
    if (node.value) lines.push(lineOf(shapeOf(node.value), SMALL, "muted"));
    return faceFrom(lines);
  }

  function groupFace(id) {
    const group = groupOf(id);
    const status = statusOf(id);
    const lines = [lineOf(marked(status, group.name), LABEL, status)];
    if (group.type && group.type !== group.name) lines.push(lineOf(group.type, PLAIN, "muted"));
    if (group.note) lines.push(lineOf(group.note, PLAIN, "note"));
    const badges = badgesOf(group);
    if (badges.parts.length && status === "same") lines.push(badges);
    return faceFrom(lines, TURN, group.kind === "repeat" ? STACK : 0);
  }

  function stubFace(stub) {
    const line = lineOf(stubName(stub), PLAIN, "", 130);
    return { lines: [line], w: Math.ceil((line.width + 18) / 8) * 8, h: PILL };
  }

  /** A line such as "+14 ⇄3". */
  function badgesOf(group) {
    const changed = STATUSES.filter((status) => status !== "same" && countOf(group, status));
    const parts = changed.map((status) => ({ text: `${MARKS[status]}${countOf(group, status)}`, look: status }));
    const width = parts.reduce((sum, part) => sum + measure(part.text, PLAIN), 0) + GAP * Math.max(0, parts.length - 1);
    return { parts, font: PLAIN, look: "", width };
  }

  // ---------------------------------------------------------------- Layout

  const layouts = new Map(); // of open groups, by id
  const arrangements = new Map(); // by sizes and edges: equal layers are arranged once

  /** The layout of the inside of an open group: boxes of its items, then of its stubs, and edges between them. */
  function layoutOf(id) {
    let layout = layouts.get(id);
    if (layout) return layout;
    const group = groupOf(id);
    const items = group.items ?? [];
    const stubs = stubsOf(id);
    const ids = [...items, ...stubs.map((_, position) => `${id}/${position}`)];
    const sizes = ids.map(sizeOf);
    const edges = [...(group.edges ?? [])];
    stubs.forEach((stub, position) => {
      for (const [to, status] of stub.readers) edges.push([items.length + position, to, status]);
    });
    const key = JSON.stringify([sizes, edges, items.length]);
    let arranged = arrangements.get(key);
    if (!arranged) arrangements.set(key, (arranged = arrange(sizes, edges, items.length)));
    layout = { ...arranged, ids, at: new Map(ids.map((inner, position) => [inner, position])) };
    layouts.set(id, layout);
    return layout;
  }

  function sizeOf(id) {
    if (isGroup(id) && open.has(id)) {
      const layout = layoutOf(id);
      const [name, note] = faceOf(id).lines;
      const more = groupOf(id).kind === "branch" && note ? note.width + 10 : 0; // a branch shows its rank also when open
      const header = name.width + more + TURN + 2 * PAD;
      return [Math.ceil(Math.max(layout.w + 2 * INSET, header)), layout.h + HEADER + 2 * INSET];
    }
    const face = faceOf(id);
    return [face.w, face.h];
  }

  /** Forget the layout of a group and of all around it. */
  function forget(id) {
    for (const group of [id, ...around(id)]) layouts.delete(group);
  }

  const ROOM = 22; // between the pills above a box, and the box
  const PILL = 22; // height of a stub

  /** Place boxes of the given sizes, the first `count` of them items and the others stubs, and route their edges. */
  function arrange(sizes, edges, count) {
    if (!sizes.length) return { w: 60, h: 20, boxes: [], edges: [] };
    const wires = edges.map(([from, to, status]) => ({ from, to, status })).filter(({ from, to }) => from !== to);
    const units = unitsOf(sizes, wires, count);
    const graph = layoutUnits(units, wires);
    const rows = rowsOf(units, wires, graph);
    straighten(rows);
    const boxes = boxesOf(units, sizes);
    const ports = portsOf(boxes, units, wires);
    const routed = wires.map((wire) => route(wire, boxes, units, ports.get(wire)));
    return framed(boxes, routed);
  }

  /** What is placed as a whole: a box, with those stubs above it that only it reads, or a stub that several read. */
  function unitsOf(sizes, wires, count) {
    const units = sizes.map(([w, h], position) => ({ position, w, h, head: 0, left: [], right: [], host: null }));
    for (let stub = count; stub < sizes.length; stub += 1) {
      const out = wires.filter((wire) => wire.from === stub);
      if (out.length === 1) units[stub].host = units[out[0].to];
    }
    for (const unit of units) {
      const pills = units.filter((other) => other.host === unit);
      if (!pills.length) continue;
      const entering = wires.filter((wire) => wire.to === unit.position && units[wire.from].host === null).length;
      const half = Math.ceil(pills.length / 2);
      unit.left = pills.slice(0, half);
      unit.right = pills.slice(half);
      // What enters from above passes between them.
      unit.aisle = entering ? 16 * Math.min(entering, 6) + 16 : unit.right.length && GAP;
      const side = Math.max(widthOf(unit.left), widthOf(unit.right));
      if (!entering) unit.shift = (widthOf(unit.left) - widthOf(unit.right)) / 2;
      const all = entering ? 2 * side + unit.aisle : widthOf(pills);
      unit.head = PILL + ROOM;
      unit.w = Math.max(unit.w, all);
      unit.h += unit.head;
    }
    return units;
  }

  const widthOf = (pills) => pills.reduce((sum, pill) => sum + pill.w, 0) + GAP * Math.max(0, pills.length - 1);

  function layoutUnits(units, wires) {
    const graph = new dagre.graphlib.Graph({ multigraph: true });
    const ranker = units.length > 150 ? "longest-path" : "network-simplex"; // the better one takes long for many boxes
    graph.setGraph({ rankdir: "TB", nodesep: 24, ranksep: 36, edgesep: 14, ranker });
    for (const { position, w, h, host } of units) if (!host) graph.setNode(String(position), { width: w, height: h });
    wires.forEach((wire, number) => {
      if (!units[wire.from].host) graph.setEdge(String(wire.from), String(wire.to), {}, String(number));
    });
    dagre.layout(graph);
    return graph;
  }

  /** The rows of units, each in order from the left, with a place for every edge that passes. */
  function rowsOf(units, wires, graph) {
    const rows = new Map();
    const put = (y, place) => {
      const key = Math.round(y * 4);
      if (!rows.has(key)) rows.set(key, { y, top: y, bottom: y, places: [] });
      const row = rows.get(key);
      row.top = Math.min(row.top, y - place.h / 2);
      row.bottom = Math.max(row.bottom, y + place.h / 2);
      row.places.push(Object.assign(place, { row, up: [], down: [] }));
    };
    for (const unit of units) {
      if (unit.host) continue;
      const { x, y } = graph.node(String(unit.position));
      put(y, Object.assign(unit, { x, apart: 12 }));
    }
    wires.forEach((wire, number) => {
      wire.way = [];
      if (units[wire.from].host) return;
      const { points } = graph.edge({ v: String(wire.from), w: String(wire.to), name: String(number) });
      for (const { x, y } of points.slice(1, -1)) {
        if (!rows.has(Math.round(y * 4))) continue; // between two rows
        wire.way.push({ x, w: 0, h: 0, apart: 7 });
        put(y, wire.way.at(-1));
      }
      const all = [units[wire.from], ...wire.way, units[wire.to]];
      all.slice(1).forEach((place, order) => tie(all[order], place));
    });
    const sorted = [...rows.values()].sort((a, b) => a.y - b.y);
    for (const row of sorted) row.places.sort((a, b) => a.x - b.x);
    return sorted;
  }

  /** Let two places in different rows draw each other: the long way of an edge most, then a box and the next. */
  function tie(a, b) {
    const passing = Number(a.w === 0) + Number(b.w === 0);
    const weight = [4, 1, 8][passing];
    const [above, below] = a.row.y < b.row.y ? [a, b] : [b, a];
    above.down.push([below, weight]);
    below.up.push([above, weight]);
  }

  /** Move places sideways until edges run straight where they can; the order in each row stays as it is. */
  function straighten(rows) {
    const bent = () => rows.reduce((sum, row) => sum + row.places.reduce((part, place) => part + pull(place), 0), 0);
    const pull = (place) => place.down.reduce((sum, [other, weight]) => sum + weight * Math.abs(other.x - place.x), 0);
    const snapshot = () => rows.map((row) => row.places.map((place) => place.x));
    let [least, best] = [bent(), snapshot()];
    for (let pass = 0; pass < 8; pass += 1) {
      if (pass % 2) [...rows].reverse().forEach((row) => settle(row.places, "down"));
      else rows.forEach((row) => settle(row.places, "up"));
      const now = bent();
      if (now < least) [least, best] = [now, snapshot()];
    }
    rows.forEach((row, number) => row.places.forEach((place, order) => (place.x = best[number][order])));
  }

  /** Move each place of a row to the middle of what draws it, or as near as its neighbours allow. */
  function settle(places, side) {
    let offset = 0;
    const blocks = []; // places that touch, moved together
    places.forEach((place, order) => {
      if (order) {
        const before = places[order - 1];
        offset += (before.w + place.w) / 2 + before.apart + place.apart;
      }
      const weight = place[side].reduce((sum, [, pull]) => sum + pull, 0) || 0.1;
      const at = (median(place[side]) ?? place.x) - offset;
      let block = { at, wishes: [[{ x: at }, weight]], members: [[place, offset]] };
      while (blocks.length && blocks.at(-1).at > block.at) {
        const other = blocks.pop();
        const wishes = [...other.wishes, ...block.wishes];
        block = { at: median(wishes), wishes, members: [...other.members, ...block.members] };
      }
      blocks.push(block);
    });
    for (const block of blocks) for (const [place, along] of block.members) place.x = block.at + along;
  }

  /** The weighted median of where places are. */
  function median(ties) {
    if (!ties.length) return undefined;
    const sorted = [...ties].sort((a, b) => a[0].x - b[0].x);
    const half = sorted.reduce((sum, [, weight]) => sum + weight, 0) / 2;
    let passed = 0;
    for (let order = 0; order < sorted.length; order += 1) {
      passed += sorted[order][1];
      if (passed > half) return sorted[order][0].x;
      if (passed === half) return (sorted[order][0].x + sorted[order + 1][0].x) / 2;
    }
    return sorted.at(-1)[0].x;
  }

  /** The rectangles of all boxes: units, and the stubs above them. */
  function boxesOf(units, sizes) {
    const boxes = new Array(units.length);
    for (const unit of units) {
      if (unit.host) continue;
      const [w, h] = sizes[unit.position];
      const top = Math.round(unit.row.y - unit.h / 2);
      boxes[unit.position] = { x: Math.round(unit.x - w / 2), y: top + unit.head, w, h };
      if (!unit.head) continue;
      let x = unit.x + (unit.shift ?? 0) - unit.aisle / 2 - widthOf(unit.left);
      for (const pill of [...unit.left, null, ...unit.right]) {
        if (!pill) {
          x = unit.x + (unit.shift ?? 0) + unit.aisle / 2;
          continue;
        }
        boxes[pill.position] = { x: Math.round(x), y: top, w: pill.w, h: pill.h };
        x += pill.w + GAP;
      }
    }
    return boxes;
  }

  /** Where edges enter their boxes: below where they come from, or beside each other there. */
  function portsOf(boxes, units, wires) {
    const ports = new Map();
    for (const unit of units) {
      const box = boxes[unit.position];
      const reach = box.w / 2 - 10;
      const aisle = unit.head ? Math.min(reach, unit.aisle / 2 - 6) : reach;
      const middle = box.x + box.w / 2;
      const entering = wires.filter((wire) => wire.to === unit.position).map((wire) => {
        const source = units[wire.from];
        const side = unit.left.includes(source) ? -1 : Number(unit.right.includes(source));
        const x = wire.way.at(-1)?.x ?? boxes[wire.from].x + boxes[wire.from].w / 2;
        const within = side ? reach : Math.max(aisle, 0);
        const weight = side || wire.way.length ? 1 : 100; // what comes from the box above runs straight
        return { wire, side, w: 0, x, ties: [[{ x: clamp(x, middle - within, middle + within) }, weight]] };
      });
      entering.sort((a, b) => a.side - b.side || a.x - b.x);
      const apart = Math.min(7, (reach * 2) / Math.max(1, entering.length - 1) / 2);
      for (const port of entering) port.apart = apart;
      settle(entering, "ties");
      const last = entering.length - 1;
      entering.forEach((port, order) => {
        const [low, high] = [middle - reach + 2 * apart * order, middle + reach - 2 * apart * (last - order)];
        ports.set(port.wire, clamp(port.x, low, high)); // no port beyond the corners of its box
      });
    }
    return ports;
  }

  /** The path of an edge: straight beside boxes, curved between rows. An edge that closes a cycle runs upwards. */
  function route({ from, to, status, way }, boxes, units, port) {
    const [source, target] = [boxes[from], boxes[to]];
    const x = source.x + source.w / 2;
    const near = units[from].host;
    const down = near || units[from].row.y <= units[to].row.y ? 1 : -1;
    const [enter, leave] = down > 0 ? ["top", "bottom"] : ["bottom", "top"];
    const end = down > 0 ? target.y : target.y + target.h;
    const points = [[x, down > 0 ? source.y + source.h : source.y]];
    if (near) {
      points.push([port, end - 9]);
    } else {
      points.push([x, units[from].row[leave]]);
      for (const place of way) points.push([place.x, place.row[enter]], [place.x, place.row[leave]]);
      points.push([port, units[to].row[enter] - 9 * down]);
    }
    points.push([port, end - 6 * down]);
    return { from, to, status, points, end, down };
  }

  /** The finished layout, moved so that it begins at 0. */
  function framed(boxes, routed) {
    const xs = routed.flatMap((edge) => edge.points.map((point) => point[0]));
    const least = xs.reduce((a, b) => Math.min(a, b - 6), Infinity);
    const most = xs.reduce((a, b) => Math.max(a, b + 6), -Infinity);
    const left = Math.floor(boxes.reduce((a, box) => Math.min(a, box.x), least));
    const right = Math.ceil(boxes.reduce((a, box) => Math.max(a, box.x + box.w), most));
    const top = boxes.reduce((least, box) => Math.min(least, box.y), Infinity);
    const bottom = boxes.reduce((most, box) => Math.max(most, box.y + box.h), -Infinity);
    for (const box of boxes) {
      box.x -= left;
      box.y -= top;
    }
    const edges = routed.map(({ from, to, status, points, end, down }) => {
      const way = points.map(([x, y]) => [x - left, y - top]);
      const tip = `M${round(way.at(-1)[0])} ${end - top}l-4 ${-8 * down}h8z`;
      const [wayXs, wayYs] = [way.map((point) => point[0]), way.map((point) => point[1])];
      const bounds = { x: Math.min(...wayXs) - 4, y: Math.min(...wayYs) - 8, w: 0, h: 0 };
      bounds.w = Math.max(...wayXs) + 4 - bounds.x;
      bounds.h = Math.max(...wayYs) + 8 - bounds.y;
      return { from, to, status, line: curve(way), tip, bounds };
    });
    return { w: right - left, h: bottom - top, boxes, edges };
  }

  const round = (number) => Math.round(number * 10) / 10;

  function curve(way) {
    let path = `M${round(way[0][0])} ${round(way[0][1])}`;
    for (let position = 1; position < way.length; position += 1) {
      const [[x0, y0], [x1, y1]] = [way[position - 1], way[position]];
      const middle = round((y0 + y1) / 2);
      if (Math.abs(x0 - x1) < 0.5) path += `L${round(x1)} ${round(y1)}`;
      else path += `C${round(x0)} ${middle} ${round(x1)} ${middle} ${round(x1)} ${round(y1)}`;
    }
    return path;
  }

  /** The rectangle of something in the world; what is around it must be open. */
  function placeOf(id) {
    if (id === ROOT) {
      const { w, h } = layoutOf(ROOT);
      return { x: 0, y: 0, w, h };
    }
    const inside = insideOf(parentOf(id));
    const layout = layoutOf(parentOf(id));
    const box = layout.boxes[layout.at.get(id)];
    return { x: inside.x + box.x, y: inside.y + box.y, w: box.w, h: box.h };
  }

  /** Where the inside of an open group begins in the world. */
  function insideOf(id) {
    if (id === ROOT) return { x: 0, y: 0 };
    const { x, y, w } = placeOf(id);
    return { x: x + (w - layoutOf(id).w) / 2, y: y + HEADER + INSET };
  }

  /** The outermost closed group around something, or the thing itself. */
  function shownAs(id) {
    return around(id).reduce((shown, group) => (open.has(group) ? shown : group), id);
  }

  // ---------------------------------------------------------------- What is dimmed

  function isDim(id) {
    if (isStub(id)) {
      const items = groupOf(parentOf(id)).items;
      return [...stubOf(id).readers].every(([to, status]) => off.has(status) || isDim(items[to]));
    }
    if (!isGroup(id)) return off.has(nodeOf(id).status) || (near !== null && !near.nodes[numberOf(id)]);
    if (near !== null && !near.groups.has(id)) return true;
    const group = groupOf(id);
    return group.counts.nodes > 0 && STATUSES.every((status) => off.has(status) || !countOf(group, status));
  }

  /** Nodes within some steps of dataflow, in either direction, of a node that is not the same; and their groups. */
  function nearChanges(hops) {
    const reached = new Uint8Array(nodes.length);
    const around_ = new Set();
    let border = nodes.flatMap((node, number) => (node.status === "same" ? [] : [number]));
    border.forEach((number) => (reached[number] = 1));
    for (let hop = 0; hop < hops; hop += 1) {
      const next = [];
      for (const number of border) {
        const { inputs = [], former = [] } = nodes[number];
        for (const id of [...inputs, ...former, ...usersOf()[number]]) {
          if (!reached[numberOf(id)]) next.push(numberOf(id));
          reached[numberOf(id)] = 1;
        }
      }
      border = next;
    }
    reached.forEach((yes, number) => {
      for (let group = nodes[number].group; yes && group !== undefined && !around_.has(group); group = parentOf(group)) {
        around_.add(group);
      }
    });
    return { nodes: reached, groups: around_ };
  }

  // ---------------------------------------------------------------- Drawing

  let made = 0; // elements in the drawing that is being made
  let drawn = null; // the area and scale of the last drawing
  let waiting = false;

  function make(tag, attributes, parent, text) {
    const element = document.createElementNS(SVG, tag);
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    if (text !== undefined) element.textContent = text;
    parent?.append(element);
    made += 1;
    return element;
  }

  const meets = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
  const holds = (a, b) => a.x <= b.x && a.y <= b.y && a.x + a.w >= b.x + b.w && a.y + a.h >= b.y + b.h;
  const readable = (font) => font.size * view.k >= LEAST - 0.01;

  /** What the window shows of the world, with a margin as a share of the window. */
  function windowArea(margin) {
    const { x, y, k } = view;
    const [dx, dy] = [size.w * margin, size.h * margin];
    return { x: (-x - dx) / k, y: (-y - dy) / k, w: (size.w + 2 * dx) / k, h: (size.h + 2 * dy) / k };
  }

  /** Draw at the next frame. A drawing that still covers the window is only moved. */
  function redraw(anew = true) {
    if (anew) drawn = null;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  const transformOf = () => `translate(${round(view.x)} ${round(view.y)}) scale(${view.k})`;

  function draw() {
    if (drawn && drawn.k === view.k && holds(drawn.area, windowArea(0))) {
      svg.firstElementChild.setAttribute("transform", transformOf());
      return;
    }
    const wide = drawWorld(windowArea(0.3));
    const { world, area } = wide.complete ? wide : drawWorld(windowArea(0));
    svg.replaceChildren(world);
    drawn = { area, k: view.k };
    document.documentElement.dataset.drawn = String(svg.getElementsByTagName("*").length);
  }

  /** Draw what meets an area, from the outside to the inside, as far as the number of elements allows. */
  function drawWorld(area) {
    made = 0;
    const world = make("g", { class: "world", transform: transformOf() });
    const queue = [ROOT];
    let complete = true;
    const reserve = 6; // for the selection
    while (queue.length) {
      const id = queue.shift();
      const inside = insideOf(id);
      const layout = layoutOf(id);
      const local = { x: area.x - inside.x, y: area.y - inside.y, w: area.w, h: area.h };
      const seen = layout.ids.filter((_, position) => meets(layout.boxes[position], local));
      const lines = layout.edges.filter((edge) => meets(edge.bounds, local));
      const affordable = (all) => made + costOf(seen, all) + 2 * queue.length + reserve <= MOST_ELEMENTS;
      const far = !readable(LABEL);
      const together = LABEL.size * GROWN * view.k < LEAST || ((far || id === ROOT) && !affordable(false));
      if (id !== ROOT && !affordable(together)) {
        drawUnaffordable(world, id);
        complete = false;
        continue;
      }
      complete &&= far || !together;
      queue.push(...drawInside(world, inside, layout, seen, lines, together));
    }
    drawSelection(world);
    return { world, area, complete };
  }

  /** An upper bound of the elements that boxes need; the edges of a group are a few paths. */
  function costOf(ids, together) {
    let cost = 14; // edges
    if (together) cost += 24; // one path for each look
    for (const id of ids) {
      if (isOpen(id)) cost += together ? 4 : 16;
      else if (!together) cost += faceOf(id).lines.length + 10;
    }
    return cost;
  }

  const isOpen = (id) => isGroup(id) && open.has(id);

  /** Draw the inside of a group, and return the groups inside that are to be drawn next. */
  function drawInside(world, inside, layout, seen, edges, together) {
    const g = make("g", { transform: `translate(${inside.x} ${inside.y})` }, world);
    const next = [];
    drawEdges(g, layout, edges);
    const paths = new Map();
    for (const id of seen) {
      const box = layout.boxes[layout.at.get(id)];
      if (isOpen(id)) {
        drawFrame(g, id, box, together);
        if (box.w * view.k > 10 && box.h * view.k > 10) next.push(id);
      } else if (together) {
        const look = `plain ${lookOf(id)}`;
        paths.set(look, `${paths.get(look) ?? ""}M${box.x} ${box.y}h${box.w}v${box.h}h${-box.w}z`);
      } else {
        drawBox(g, id, box);
      }
    }
    for (const [look, d] of paths) make("path", { class: look, d }, g);
    return next;
  }

  /** Draw edges: two paths for all those that look the same. */
  function drawEdges(g, layout, edges) {
    const looks = new Map();
    const dim = new Map();
    const dimmed = (position) => {
      if (!dim.has(position)) dim.set(position, isDim(layout.ids[position]));
      return dim.get(position);
    };
    for (const edge of edges) {
      const look = edge.status + (off.has(edge.status) || dimmed(edge.from) || dimmed(edge.to) ? " dim" : "");
      const paths = looks.get(look) ?? { line: "", tip: "" };
      looks.set(look, { line: paths.line + edge.line, tip: paths.tip + edge.tip });
    }
    for (const [look, { line, tip }] of [...looks].sort()) {
      make("path", { class: `edge ${look}`, d: line }, g);
      make("path", { class: `tip ${look}`, d: tip }, g);
    }
  }

  /** The classes of a box. */
  function lookOf(id) {
    const dim = isDim(id) ? " dim" : "";
    if (isStub(id)) return `stub${dim}`;
    if (isGroup(id)) return `group ${groupOf(id).kind} ${statusOf(id)}${dim}`;
    const { kind, status } = nodeOf(id);
    return `node ${kind === "input" || kind === "output" ? "ends " : ""}${status}${dim}`;
  }

  function drawBox(parent, id, box) {
    const face = faceOf(id);
    const g = make("g", { class: `box ${lookOf(id)}`, "data-id": id }, parent);
    make("title", {}, g, tooltipOf(id));
    const repeat = isGroup(id) && groupOf(id).kind === "repeat";
    const card = repeat ? { ...box, w: box.w - STACK, h: box.h - STACK } : box;
    if (repeat) for (const by of [STACK, STACK / 2]) drawRect(g, { ...card, x: box.x + by, y: box.y + by }, 6);
    drawRect(g, card, roundness(id, box));
    const lines = linesOf(face, card.w - 12 - (isGroup(id) ? PAD + TURN : 0), card.h - 4);
    let y = card.y + (card.h - lines.reduce((sum, line) => sum + line.font.line, 0)) / 2;
    if (isGroup(id)) drawTriangle(g, card.x + PAD, y + LABEL.line / 2, false);
    for (const line of lines) {
      const x = isGroup(id) ? card.x + PAD + TURN : card.x + card.w / 2;
      drawLine(g, line, x, y, isGroup(id) ? "start" : "middle");
      y += line.font.line;
    }
  }

  /** The lines of a face that can be read; where that is the first at most, it is as large as there is room for. */
  function linesOf(face, w, h) {
    if (readable(SMALL)) return face.lines;
    const lines = face.lines.filter((line) => readable(line.font));
    if (lines.length > 1) return lines;
    const [first] = face.lines;
    const { size: px, weight, line } = first.font;
    const least = LEAST / (px * view.k); // what is longer is cut
    const grown = Math.min(Math.max(Math.min(w / first.width, GROWN), least), h / line);
    const text = cut(first.text, w / grown, first.font);
    const font = { size: px * grown, weight, line: line * grown };
    return text.length < 4 && text !== first.text ? [] : [{ ...first, text, width: measure(text, first.font) * grown, font }];
  }

  function roundness(id, box) {
    if (isStub(id) || /\bends\b/.test(lookOf(id))) return Math.min(box.h / 2, 16);
    return isGroup(id) ? 6 : 4;
  }

  function drawRect(parent, { x, y, w, h }, rx, look) {
    return make("rect", { x, y, width: w, height: h, rx, ...(look ? { class: look } : {}) }, parent);
  }

  function drawTriangle(parent, x, y, down) {
    if (9 * view.k < 2) return;
    const d = down ? `M${x} ${y - 3}h9l-4.5 6z` : `M${x + 1} ${y - 4.5}v9l6 -4.5z`;
    make("path", { class: "triangle", d }, parent);
  }

  /** Draw a line of text whose upper edge is at y, unless it would be too small to read. */
  function drawLine(parent, line, x, y, anchor) {
    if (!readable(line.font)) return;
    const { size: px, weight, line: height } = line.font;
    const baseline = round(y + height / 2 + px * 0.36);
    const attributes = { x, y: baseline, "font-size": Math.floor(px * 100) / 100, "font-weight": weight, "text-anchor": anchor };
    if (line.look && line.look !== "same") attributes.class = line.look;
    const text = make("text", attributes, parent, line.parts ? undefined : line.text);
    (line.parts ?? []).forEach((part, order) => {
      make("tspan", { class: part.look, ...(order ? { dx: GAP } : {}) }, text, part.text);
    });
  }

  /** Draw the frame and the header of an open group. */
  function drawFrame(parent, id, box, together) {
    const look = `open ${around(id).length % 2 ? "odd" : "even"} ${lookOf(id)}`;
    if (together) {
      const g = make("g", { class: look, "data-id": id }, parent);
      drawRect(g, box, 8);
      return;
    }
    const g = make("g", { class: `box ${look}`, "data-id": id }, parent);
    make("title", {}, g, tooltipOf(id));
    drawRect(g, box, 8);
    drawTriangle(g, box.x + PAD, box.y + HEADER / 2 + 1, true);
    let x = box.x + PAD + TURN;
    const [name, ...others] = linesOf(faceOf(id), box.w - 2 * PAD - TURN, HEADER - 4);
    if (!name) return;
    drawLine(g, name, x, box.y + (HEADER - name.font.line) / 2 + 1, "start");
    x += name.width + 10;
    for (const line of others) {
      if (x + line.width > box.x + box.w - PAD) break;
      drawLine(g, line, x, box.y + (HEADER - line.font.line) / 2 + 2, "start");
      x += line.width + 10;
    }
  }

  /** Draw an open group for which no elements are left as a closed one of the same size. */
  function drawUnaffordable(world, id) {
    const { x, y, w, h } = placeOf(id);
    drawRect(world, { x: x + 6, y: y + HEADER, w: w - 12, h: h - HEADER - 6 }, 5, "closed-up");
    const text = `zoom in: ${plural(groupOf(id).counts.nodes, "operator")}`;
    const px = Math.min(13 / view.k, ((w - 24) / measure(text, LABEL)) * LABEL.size, (h - HEADER) / 3);
    if (px * view.k < LEAST) return;
    const [middle, baseline] = [x + w / 2, y + HEADER / 2 + h / 2 + px * 0.36];
    const attributes = { class: "muted", x: middle, y: baseline, "font-size": round(px), "text-anchor": "middle" };
    make("text", attributes, world, text);
  }

  /** Draw a ring around what is selected, or around the closed group it is in, and its edges in bold. */
  function drawSelection(world) {
    if (selected === null || selected === ROOT) return;
    const shown = shownAs(selected);
    const { x, y, w, h } = placeOf(shown);
    if (shown === selected) {
      const inside = insideOf(parentOf(shown));
      const layout = layoutOf(parentOf(shown));
      const position = layout.at.get(shown);
      const edges = layout.edges.filter((edge) => edge.from === position || edge.to === position);
      const g = make("g", { transform: `translate(${inside.x} ${inside.y})` }, world);
      make("path", { class: "edge chosen", d: edges.map((edge) => edge.line).join("") || "M0 0" }, g);
      make("path", { class: "tip chosen", d: edges.map((edge) => edge.tip).join("") || "M0 0" }, g);
    }
    const apart = 3 + 1 / view.k;
    const ring = { x: x - apart, y: y - apart, w: w + 2 * apart, h: h + 2 * apart };
    drawRect(world, ring, roundness(shown, { h: h + 2 * apart }) + 3, "ring");
    world.lastChild.setAttribute("stroke-width", Math.max(2.5, 2 / view.k));
  }

  // ---------------------------------------------------------------- The view

  const clamp = (number, low, high) => Math.max(low, Math.min(high, number));
  const BELOW = 56; // height of the legend

  function fit() {
    const { w, h } = layoutOf(ROOT);
    view.k = clamp(Math.min((size.w - 48) / w, (size.h - 36 - BELOW) / h), 0.004, 1.2);
    view.x = (size.w - w * view.k) / 2;
    view.y = Math.max(18, (size.h - BELOW - h * view.k) / 2);
    redraw();
  }

  /** Zoom by a factor about a point of the stage. */
  function zoom(factor, x = size.w / 2, y = size.h / 2) {
    const k = clamp(view.k * factor, 0.004, 6);
    view.x = x - ((x - view.x) * k) / view.k;
    view.y = y - ((y - view.y) * k) / view.k;
    view.k = k;
    redraw(false);
  }

  function pan(dx, dy) {
    view.x += dx;
    view.y += dy;
    redraw(false);
  }

  /** Bring something to the middle of the window, at a scale at which it can be read. */
  function centre(id) {
    const { x, y, w, h } = placeOf(shownAs(id));
    const fitting = Math.min((size.w - 60) / w, (size.h - 60 - BELOW) / h);
    view.k = Math.min(clamp(view.k, 0.85, 2), Math.max(fitting, 0.55));
    view.x = size.w / 2 - (x + w / 2) * view.k;
    view.y = h * view.k > size.h - 60 ? 30 - y * view.k : (size.h - BELOW) / 2 - (y + h / 2) * view.k;
    redraw();
  }

  /** Move the view as little as is needed to see something. */
  function follow(id) {
    const { x, y, w, h } = placeOf(shownAs(id));
    if (w * view.k < 8) return centre(id);
    const [left, top] = [x * view.k + view.x, y * view.k + view.y];
    const [right, bottom] = [left + w * view.k, top + h * view.k];
    if (left < 20 || right > size.w - 20) view.x += left < 20 || right - left > size.w - 40 ? 20 - left : size.w - 20 - right;
    const floor = size.h - BELOW;
    if (top < 20 || bottom > floor) view.y += top < 20 || bottom - top > floor - 20 ? 20 - top : floor - bottom;
    redraw();
    return undefined;
  }

  // ---------------------------------------------------------------- Opening and selecting

  /** Open or close a group; its upper left corner stays where it is on the screen. */
  function setOpen(id, want, deep = false) {
    if (id === ROOT && !deep) return;
    performance.mark("viewer:opening");
    const before = placeOf(shownAs(id));
    const all = deep ? inner(id) : [id];
    for (const group of all) {
      if (want) open.add(group);
      else if (group !== ROOT) open.delete(group);
      layouts.delete(group);
    }
    forget(id);
    const after = placeOf(shownAs(id));
    view.x += (before.x - after.x) * view.k;
    view.y += (before.y - after.y) * view.k;
    drawn = null;
    draw();
    showDetails();
    requestAnimationFrame(() => setTimeout(() => performance.measure("open", "viewer:opening")));
  }

  /** A group and all groups in it. */
  function inner(id) {
    const found = [id];
    for (const group of found) found.push(...(groupOf(group).items ?? []).filter(isGroup));
    return found;
  }

  function toggle(id, deep = false) {
    if (!isGroup(id)) return;
    if (deep) setOpen(id, !inner(id).every((group) => open.has(group)), true);
    else setOpen(id, !open.has(id));
  }

  function select(id) {
    selected = id;
    if (id !== null && changes.includes(id)) changeAt = changes.indexOf(id);
    showChange();
    showDetails();
    byId("said").textContent = id === null ? "" : `selected: ${visible(titleOf(id))}`.slice(0, 200);
    redraw();
  }

  /** Open all that is around something, select it and bring it to the middle. */
  function reveal(id) {
    const closed = around(id).filter((group) => !open.has(group));
    if (closed.length) performance.mark("viewer:opening");
    closed.forEach((group) => open.add(group));
    closed.forEach(forget);
    select(id);
    centre(id);
    if (!closed.length) return;
    requestAnimationFrame(() => setTimeout(() => performance.measure("open", "viewer:opening")));
  }

  /** Go to the next or the previous change. */
  function goToChange(step) {
    if (!changes.length) return;
    const from = changeAt < 0 && step < 0 ? 0 : changeAt;
    changeAt = (from + step + changes.length) % changes.length;
    reveal(changes[changeAt]);
  }

  function showChange() {
    const total = changes.length.toLocaleString("en");
    const narrow = changes.length > 999 || matchMedia("(max-width: 900px)").matches;
    const at = `${narrow ? "" : "change "}${(changeAt + 1).toLocaleString("en")} of ${total}`;
    // What is visited is a branch as a whole, or an operator; the counts beside are of operators alone.
    const branches = changes.filter((id) => id.startsWith("g")).length;
    const kinds = [branches && plural(branches, "branch").replace("branchs", "branches"), plural(changes.length - branches, "operator")];
    const counted = narrow || !branches ? plural(changes.length, "change") : `${plural(changes.length, "change")}: ${kinds.join(", ")}`;
    byId("change").textContent = changes.length ? (changeAt < 0 ? counted : at) : "no changes";
    byId("next").disabled = byId("previous").disabled = !changes.length;
  }

  /** The box that an arrow key goes to from the selected one. */
  function beside(id, direction) {
    const layout = layoutOf(parentOf(id));
    const position = layout.at.get(id);
    const own = layout.boxes[position];
    const across = (box) => Math.abs(box.x + box.w / 2 - own.x - own.w / 2);
    const away = (box) => Math.abs(box.y + box.h / 2 - own.y - own.h / 2);
    const nearest = (positions, distance) => {
      const sorted = positions.sort((a, b) => distance(layout.boxes[a]) - distance(layout.boxes[b]) || a - b);
      return sorted.length ? layout.ids[sorted[0]] : null;
    };
    if (direction === "ArrowUp") {
      const sources = layout.edges.filter((edge) => edge.to === position).map((edge) => edge.from);
      return nearest(sources, (box) => across(box) + 2 * away(box)) ?? (parentOf(id) === ROOT ? null : parentOf(id));
    }
    if (direction === "ArrowDown") {
      const users = layout.edges.filter((edge) => edge.from === position).map((edge) => edge.to);
      return nearest(users, (box) => across(box) + 2 * away(box));
    }
    const sign = direction === "ArrowLeft" ? -1 : 1;
    const there = layout.ids.map((_, at) => at).filter((at) => {
      const box = layout.boxes[at];
      return at !== position && sign * (box.x + box.w / 2 - own.x - own.w / 2) > 1;
    });
    return nearest(there, (box) => across(box) + 4 * away(box));
  }

  function move(direction) {
    if (selected === null) {
      const first = layoutOf(ROOT).ids[0];
      if (first) select(first);
    } else if (selected !== ROOT) {
      const next = beside(shownAs(selected), direction);
      if (next) select(next);
    }
    if (selected !== null && selected !== ROOT) follow(selected);
  }

  /** Go into the selected group, or to where the value of a stub comes from. */
  function enter() {
    if (selected === null) return;
    if (isStub(selected)) {
      reveal(stubOf(selected).source);
    } else if (isGroup(selected) && groupOf(selected).items?.length) {
      if (!open.has(selected)) setOpen(selected, true);
      select(groupOf(selected).items[0]);
      follow(selected);
    }
  }

  // ---------------------------------------------------------------- Pointer

  /** What is at a point of the world: its id, and whether it is where a press opens or closes it. */
  function hit(x, y) {
    let id = ROOT;
    for (;;) {
      const inside = insideOf(id);
      const layout = layoutOf(id);
      const [dx, dy] = [x - inside.x, y - inside.y];
      const position = layout.boxes.findIndex(
        (box) => dx >= box.x && dx <= box.x + box.w && dy >= box.y && dy <= box.y + box.h
      );
      if (position < 0) return { id, turns: false };
      const box = layout.boxes[position];
      id = layout.ids[position];
      const big = LABEL.size * GROWN * view.k >= LEAST;
      if (!isOpen(id)) {
        return { id, turns: isGroup(id) && big && dx < box.x + PAD + TURN };
      }
      if (dy < box.y + HEADER) return { id, turns: big };
    }
  }

  function hitByEvent(event) {
    const { left, top } = svg.getBoundingClientRect();
    return hit((event.clientX - left - view.x) / view.k, (event.clientY - top - view.y) / view.k);
  }

  const pointers = new Map();
  let travelled = 0;
  let lastPress = { id: null, turned: false, time: 0 };

  function pointerDown(event) {
    if (event.button !== 0) return;
    svg.focus({ preventScroll: true });
    svg.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    travelled = pointers.size > 1 ? Infinity : 0;
  }

  function pointerMove(event) {
    const was = pointers.get(event.pointerId);
    if (!was) {
      svg.classList.toggle("pressable", hitByEvent(event).turns);
      return;
    }
    const now = { x: event.clientX, y: event.clientY };
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    pointers.set(event.pointerId, now);
    travelled += Math.abs(now.x - was.x) + Math.abs(now.y - was.y);
    if (travelled <= 4) return;
    svg.classList.add("dragging");
    if (!other) {
      pan(now.x - was.x, now.y - was.y);
      return;
    }
    const { left, top } = svg.getBoundingClientRect();
    const [before, after] = [Math.hypot(was.x - other.x, was.y - other.y), Math.hypot(now.x - other.x, now.y - other.y)];
    pan((now.x - was.x) / 2, (now.y - was.y) / 2);
    zoom(after / Math.max(before, 1), (now.x + other.x) / 2 - left, (now.y + other.y) / 2 - top);
  }

  function pointerUp(event) {
    if (!pointers.delete(event.pointerId)) return;
    if (!pointers.size) svg.classList.remove("dragging");
    if (travelled <= 4 && event.type === "pointerup") press(event);
  }

  /** A click: select, or open or close; a second one soon after opens or closes too. */
  function press(event) {
    const { id, turns } = hitByEvent(event);
    const again = lastPress.id === id && event.timeStamp - lastPress.time < 400;
    if (again && lastPress.turned) return;
    const turned = id !== ROOT && (turns || (again && isGroup(id)));
    lastPress = { id, turned, time: event.timeStamp };
    if (again && isStub(id)) reveal(stubOf(id).source);
    else select(id === ROOT ? null : id);
    if (turned) toggle(id, event.shiftKey);
  }

  function wheel(event) {
    event.preventDefault();
    const { left, top } = svg.getBoundingClientRect();
    const unit = event.deltaMode === 1 ? 30 : 1;
    const speed = event.ctrlKey ? 0.01 : 0.0018; // a pinch of a touchpad comes as small steps with ctrl
    zoom(Math.exp(-clamp(event.deltaY * unit, -300, 300) * speed), event.clientX - left, event.clientY - top);
  }

  // ---------------------------------------------------------------- Legend

  function makeLegend() {
    for (const status of STATUSES) {
      const count = data.counts?.[status] ?? 0;
      const about = { title: `Dim what is ${status}`, "aria-label": `${status}, ${count}` };
      const button = h("button", { "aria-pressed": "true", "data-status": status, ...about }, [
        h("span", { class: `swatch ${status}`, "aria-hidden": "true" }, SAMPLES[status]),
        h("span", { class: "name" }, status),
        h("span", { class: "count" }, count.toLocaleString("en")),
      ]);
      button.addEventListener("click", () => {
        if (!off.delete(status)) off.add(status);
        button.setAttribute("aria-pressed", String(!off.has(status)));
        redraw();
      });
      byId("legend").append(button);
    }
  }

  // ---------------------------------------------------------------- HTML

  /** An HTML element with children; text among them is shown as text, with invisible characters written out. */
  function h(tag, attributes = {}, children = []) {
    const element = document.createElement(tag);
    for (const name in attributes) if (attributes[name] !== undefined) element.setAttribute(name, attributes[name]);
    for (const child of [children].flat()) {
      if (child === undefined || child === null) continue;
      element.append(child instanceof Node ? child : document.createTextNode(visible(child)));
    }
    return element;
  }

  function button(text, act, attributes = {}) {
    const element = h("button", attributes, text);
    element.addEventListener("click", act);
    return element;
  }

  // ---------------------------------------------------------------- Search

  const MOST_RESULTS = 100;
  let results = [];
  let resultAt = 0;

  /** What can be found of a node or group: names of fields with their texts. */
  function fieldsOf(id) {
    const status = ["status", statusOf(id)];
    if (isGroup(id)) {
      const { name, type, path, note, kind, branch = {} } = groupOf(id);
      const own = [["group", name], ["type", type], ["module", path], ["note", note], ["kind", kind], status];
      return [...own, ["adapter", branch.adapter], ["site", branch.site], ["rule", branch.rule]];
    }
    const { name, op, label, path, value, weights = [], part } = nodeOf(id);
    const own = [["node", name], ["operator", op], ["operator", label], ["module", path], ["value", value], status];
    return [...own, ["part", part], ...weights.map((weight) => ["weight", weight.name])];
  }

  const index = lazily(() => {
    const ids = [...groups.keys()].slice(1).map((number) => `g${number}`);
    ids.push(...[...nodes.keys()].map((number) => `n${number}`));
    return ids.map((id) => {
      const texts = fieldsOf(id).flatMap(([, text]) => (text ? [text.toLowerCase()] : []));
      return { id, name: texts[0], text: texts.join("\n") };
    });
  });

  /** All that contains a text, what is called exactly so first, and then what begins with it. */
  function find(text) {
    const wanted = text.toLowerCase();
    const [exact, beginning, others] = [[], [], []];
    for (const { id, name, text: all } of index()) {
      if (!all.includes(wanted)) continue;
      if (name === wanted) exact.push(id);
      else (name?.startsWith(wanted) ? beginning : others).push(id);
    }
    return [...exact, ...beginning, ...others];
  }

  function search() {
    const text = byId("search").value;
    const found = text ? find(text) : [];
    results = found.slice(0, MOST_RESULTS);
    const more = found.length > MOST_RESULTS ? `, the first ${MOST_RESULTS} of them here` : "";
    byId("total").textContent = found.length ? plural(found.length, "result") + more : "nothing found";
    byId("results").replaceChildren(...results.map((id, order) => resultItem(id, order, text.toLowerCase())));
    showResults(text !== "");
    pickResult(0);
  }

  function resultItem(id, order, wanted) {
    const [field, match] = fieldsOf(id).find(([, text]) => text?.toLowerCase().includes(wanted));
    const about = isGroup(id) ? groupOf(id) : nodeOf(id);
    const title = isGroup(id) ? titleOf(id) : `${titleOf(id)} — ${about.name}`;
    const at = Math.max(0, match.toLowerCase().indexOf(wanted) - 30);
    const where = [];
    if (match !== about.name) where.push(`${field}: ${at ? "…" : ""}${match.slice(at, at + 160)}`);
    if (field !== "module" && about.path) where.push(`in ${about.path.slice(0, 160)}`);
    const item = h("li", { role: "option", id: `result-${order}`, "aria-selected": "false" }, [
      h("span", {}, title.slice(0, 200)),
      h("span", { class: "where" }, where.join(" · ")),
    ]);
    item.addEventListener("pointerdown", (event) => event.preventDefault()); // the search field keeps the focus
    item.addEventListener("click", () => choose(order));
    return item;
  }

  function showResults(shown) {
    byId("found").hidden = !shown;
    byId("search").setAttribute("aria-expanded", String(shown));
  }

  function pickResult(order) {
    const items = byId("results").children;
    items[resultAt]?.setAttribute("aria-selected", "false");
    resultAt = clamp(order, 0, Math.max(0, results.length - 1));
    const item = items[resultAt];
    item?.setAttribute("aria-selected", "true");
    item?.scrollIntoView({ block: "nearest" });
    byId("search").setAttribute("aria-activedescendant", item?.id ?? "");
  }

  function choose(order) {
    if (!results[order]) return;
    showResults(false);
    svg.focus({ preventScroll: true });
    reveal(results[order]);
  }

  function searchKey(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };
    if (event.key in steps) {
      if (byId("found").hidden) search();
      else pickResult(resultAt + steps[event.key]);
    } else if (event.key === "Enter") {
      choose(resultAt);
    } else if (event.key === "Escape") {
      if (byId("found").hidden) svg.focus({ preventScroll: true });
      showResults(false);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  // ---------------------------------------------------------------- Details

  const MOST_LINKS = 60;

  function showDetails() {
    const panel = byId("details");
    const id = selected ?? ROOT;
    if (isStub(id)) panel.replaceChildren(...stubDetails(id));
    else panel.replaceChildren(...(isGroup(id) ? groupDetails(id) : nodeDetails(id)));
  }

  /** A list of facts; those without a value are left out. */
  function facts(pairs) {
    const list = h("dl");
    for (const [name, value, look] of pairs) {
      if (value === undefined || value === "") continue;
      list.append(h("dt", {}, name), h("dd", look ? { class: look } : {}, value));
    }
    return list;
  }

  /** A button that jumps to something. */
  function link(id) {
    const about = isGroup(id) ? groupOf(id) : nodeOf(id);
    const text = [visible(titleOf(id)).slice(0, 200)];
    if (about.name !== about.label && !isGroup(id)) text.push(" ", h("small", {}, about.name.slice(0, 200)));
    return button(text, () => reveal(id), { class: "link", "data-to": id });
  }

  function links(heading, ids) {
    if (!ids?.length) return [];
    const shown = ids.slice(0, MOST_LINKS).map(link);
    if (ids.length > MOST_LINKS) shown.push(h("p", { class: "hint" }, `and ${ids.length - MOST_LINKS} more`));
    return [h("h3", {}, heading), h("div", {}, shown)];
  }

  function statusWord(status) {
    return status === "same" ? undefined : h("span", { class: `status ${status}` }, marked(status, status));
  }

  function nodeDetails(id) {
    const node = nodeOf(id);
    const line = node.line === undefined ? undefined : data.lines?.[node.line];
    return [
      h("h2", {}, titleOf(id)),
      h("p", { class: "kind" }, node.kind === "operator" ? "operator" : node.kind),
      h("div", { class: "actions" }, [button("Centre", () => centre(id))]),
      facts([
        ["Status", statusWord(node.status)],
        ["Name", node.name, "code"],
        ["Operator", node.op === node.kind ? undefined : node.op, "code"],
        ["Value", node.value, "code"],
        ["Arguments", node.args, "code"],
        ["Module", node.path, "code"],
        ["Part", node.part],
        ["Source", line, "code"],
      ]),
      ...weightDetails(node.weights ?? []),
      ...differenceDetails(node.differences ?? []),
      ...siteDetails(node.site),
      ...links("Inputs", node.inputs),
      ...links("Read before", node.former),
      ...links("Users", usersOf()[numberOf(id)]),
    ];
  }

  function weightDetails(weights) {
    return weights.flatMap((weight) => [
      h("h3", {}, weight.trainable ? "Weight, trainable" : "Weight"),
      facts([["Name", weight.name, "code"], ["Value", weight.value, "code"]]),
    ]);
  }

  function differenceDetails(differences) {
    if (!differences.length) return [];
    const row = (cells, tag) => h("tr", {}, cells.map((cell) => h(tag, tag === "td" ? { class: "code" } : {}, cell ?? "")));
    const head = h("thead", {}, row(["", "before", "after"], "th"));
    const body = h("tbody", {}, differences.map((found) => row([found.what, found.before, found.after], "td")));
    return [h("h3", {}, "Differences"), h("table", { class: "difference" }, [head, body])];
  }

  const STATES = { branch: "has a branch", merged: "merged into the weight", none: "no branch" };

  function siteDetails(number) {
    if (number === undefined) return [];
    const site = sites[number];
    return [
      h("h3", {}, "Site"),
      facts([
        ["Name", site.name, "code"],
        ["Features", site.in === undefined ? undefined : `${site.in} → ${site.out}`],
        ["Weight", site.weight, "code"],
        ["State", STATES[site.state]],
        ["Rank", site.ranks.length ? site.ranks.join(" + ") : undefined],
        ["Chosen by", site.decision, "code"],
        ["Skipped", site.reason],
      ]),
    ];
  }

  function stubDetails(id) {
    const { source, readers, shared } = stubOf(id);
    const node = nodeOf(source);
    const items = groupOf(parentOf(id)).items;
    return [
      h("h2", {}, node.name),
      h("p", { class: "kind" }, shared ? "a value from outside of this group, shared" : "a value from outside of this group"),
      h("div", { class: "actions" }, [button("Go to its source", () => reveal(source))]),
      facts([
        ["Status", statusWord(node.status)],
        ["Operator", node.op, "code"],
        ["Value", node.value, "code"],
        ["Module", node.path, "code"],
      ]),
      ...links("Source", [source]),
      ...links("Read here by", [...readers.keys()].map((position) => items[position])),
    ];
  }

  const KINDS = {
    model: "model", module: "module", repeat: "equal parts, one after the other", branch: "low-rank branch", steps: "steps",
  };

  function groupDetails(id) {
    const group = groupOf(id);
    const branch = group.branch ?? {};
    const actions = [];
    if (id !== ROOT) {
      actions.push(button(open.has(id) ? "Close" : "Open", () => toggle(id)));
      actions.push(button("Centre", () => centre(id)));
    }
    if (inner(id).length > 1) {
      const all = inner(id).every((inside) => open.has(inside));
      actions.push(button(all ? "Close all inside" : "Open all inside", () => toggle(id, true)));
    }
    const counts = STATUSES.filter((status) => countOf(group, status));
    return [
      h("h2", {}, titleOf(id)),
      h("p", { class: "kind" }, [KINDS[group.kind], group.type ? `: ${group.type}` : undefined]),
      h("div", { class: "actions" }, actions),
      facts([
        ["Shown", id === ROOT ? captionOf() : undefined],
        ["Module", group.path, "code"],
        ["Inside", group.kind === "branch" ? undefined : group.note],
        ["Copies", group.copies === undefined ? undefined : String(group.copies)],
        ["Site", branch.site, "code"],
        ["Adapter", branch.adapter],
        ["Rank", branch.rank === undefined ? undefined : String(branch.rank)],
        ["Alpha", branch.alpha === undefined ? undefined : String(branch.alpha)],
        ["Scaling", branch.scaling === undefined ? undefined : String(branch.scaling)],
        ["Dropout", branch.dropout === undefined ? undefined : String(branch.dropout)],
        ["Part", branch.part],
        ["Chosen by", branch.rule, "code"],
        ["Operators", group.counts.nodes.toLocaleString("en")],
        ...counts.map((status) => [marked(status, status), countOf(group, status).toLocaleString("en")]),
      ]),
      ...siteList(id),
    ];
  }

  /** The sites in a group, with what became of them. */
  function siteList(id) {
    const inside = sites.filter((site) => site.node && around(site.node).includes(id));
    if (!inside.length) return [];
    return [h("h3", {}, `Sites (${inside.length.toLocaleString("en")})`), siteLinks(inside, groupOf(id).path)];
  }

  /** Buttons that jump to sites, with what became of each; names are relative to a path. */
  function siteLinks(list, path) {
    const nameOf = (site) => (path && site.name.startsWith(`${path}.`) ? site.name.slice(path.length + 1) : site.name);
    const stateOf = (site) => (site.state === "none" ? "no branch" : cellText(site));
    const shown = list.slice(0, MOST_LINKS).map((site) => {
      const label = [h("span", {}, nameOf(site).slice(0, 200)), h("small", {}, stateOf(site))];
      const attributes = { class: "link site", title: visible(site.name), "data-to": site.node };
      return button(label, () => site.node && reveal(site.node), attributes);
    });
    if (list.length > MOST_LINKS) shown.push(h("p", { class: "hint" }, `and ${list.length - MOST_LINKS} more`));
    return h("div", {}, shown);
  }

  // ---------------------------------------------------------------- Coverage

  /** What a cell of the matrix says: ranks, a tick where they are merged, a dot where there is none. */
  function cellText(site) {
    const ranks = site.ranks.join("+");
    if (site.state === "merged") return `${ranks} ✓`.trim();
    return site.state === "branch" ? ranks || "LoRA" : "·";
  }

  const showCoverage = lazily(() => {
    const panel = byId("coverage");
    const having = sites.filter((site) => site.state !== "none").length;
    const share = `${having.toLocaleString("en")} of ${plural(sites.length, "site")}`;
    const signs = ["8 rank of a branch", "8+4 two branches", "8 ✓ merged", "· no branch"];
    panel.append(h("p", { class: "hint" }, sites.length ? `${share}: a branch, or one that was merged.` : "No sites."));
    panel.append(h("ul", { class: "signs" }, signs.map((sign) => h("li", {}, sign))));
    for (const matrix of data.coverage ?? []) panel.append(h("h3", {}, matrix.stack), matrixTable(matrix));
    const elsewhere = (data.elsewhere ?? []).map((number) => sites[number]);
    if (elsewhere.length) panel.append(h("h3", {}, "Elsewhere"), siteLinks(elsewhere));
    return true;
  });

  function matrixTable({ columns, rows }) {
    const table = h("table", { class: "matrix" }, matrixHead(columns));
    const starts = partsOf(columns).map((part) => part.start);
    for (const run of runsOf(rows)) table.append(runBody(run, starts));
    return table;
  }

  /** Neighbouring columns of the same part: of self_attn.q_proj and self_attn.k_proj the part is self_attn. */
  function partsOf(columns) {
    const parts = [];
    columns.forEach((column, position) => {
      const name = column.includes(".") ? column.slice(0, column.lastIndexOf(".")) : "";
      if (parts.at(-1)?.name === name) parts.at(-1).count += 1;
      else parts.push({ name, start: position, count: 1 });
    });
    return parts;
  }

  function matrixHead(columns) {
    const parts = partsOf(columns);
    const starts = parts.map((part) => part.start);
    const above = parts.map(({ name, start, count }) =>
      h("th", { class: start ? "part first" : "part", colspan: String(count), title: visible(name), scope: "colgroup" }, name)
    );
    const names = columns.map((column, position) => {
      const look = starts.includes(position) && position ? "column first" : "column";
      const name = h("span", {}, column.slice(column.lastIndexOf(".") + 1));
      return h("th", { class: look, scope: "col", title: visible(column) }, name);
    });
    return h("thead", {}, [h("tr", {}, [h("th"), ...above]), h("tr", {}, [h("th", { scope: "col" }, "layer"), ...names])]);
  }

  /** Runs of neighbouring layers whose cells say the same. */
  function runsOf(rows) {
    const runs = [];
    const key = (row) => JSON.stringify(row.cells.map((cell) => (cell === null ? null : cellText(sites[cell]))));
    for (const row of rows) {
      if (runs.length && key(runs.at(-1)[0]) === key(row)) runs.at(-1).push(row);
      else runs.push([row]);
    }
    return runs;
  }

  function runBody(run, starts) {
    if (run.length === 1) return h("tbody", {}, matrixRow(run[0].layer, run[0], starts));
    const body = h("tbody");
    const name = `${run[0].layer}–${run.at(-1).layer}`;
    const fold = button(`▸ ${name}`, () => {
      const folded = fold.getAttribute("aria-expanded") === "true";
      fold.setAttribute("aria-expanded", String(!folded));
      fold.textContent = visible(`${folded ? "▸" : "▾"} ${name}`);
      if (folded) while (body.children.length > 1) body.lastChild.remove();
      else body.append(...run.map((row) => matrixRow(row.layer, row, starts, "inner")));
    }, { "aria-expanded": "false", title: `${run.length} equal layers` });
    body.append(matrixRow(fold, run[0], starts));
    return body;
  }

  function matrixRow(heading, row, starts, look) {
    const cells = row.cells.map((cell, position) => {
      const first = starts.includes(position) && position ? { class: "first" } : {};
      return h("td", first, cell === null ? undefined : cellButton(sites[cell]));
    });
    return h("tr", {}, [h("th", { scope: "row", class: look }, heading), ...cells]);
  }

  function cellButton(site) {
    const about = [site.name, STATES[site.state], site.reason ?? site.decision].filter((part) => part).map(visible).join("\n");
    const attributes = { class: site.state, title: about, "aria-label": about.replaceAll("\n", ", "), "data-to": site.node };
    return button(cellText(site), () => site.node && reveal(site.node), attributes);
  }

  // ---------------------------------------------------------------- Downloads

  const LINES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "vector-effect"];
  const STYLES = { rect: LINES, path: LINES, text: ["fill", "font-family"], tspan: ["fill"] };

  /** The properties that a download states in each element. */
  const stylesOf = (element) => STYLES[element.tagName] ?? [];

  /** What is shown, as an SVG that needs no style sheet. */
  function snapshot() {
    const copy = svg.cloneNode(true);
    const [from, to] = [svg.querySelectorAll("*"), copy.querySelectorAll("*")];
    from.forEach((element, order) => {
      const look = getComputedStyle(element);
      for (const name of stylesOf(element)) to[order].setAttribute(name, look.getPropertyValue(name));
      if (look.opacity !== "1") to[order].setAttribute("opacity", look.opacity);
      // Elsewhere the font may be another one: the text keeps its width, and stays in its box.
      if (element.tagName === "text" && !element.childElementCount) {
        to[order].setAttribute("textLength", round(element.getComputedTextLength()));
        to[order].setAttribute("lengthAdjust", "spacingAndGlyphs");
      }
      to[order].removeAttribute("class");
      to[order].removeAttribute("data-id");
    });
    const area = shownArea();
    for (const name of ["id", "class", "tabindex", "role", "aria-label"]) copy.removeAttribute(name);
    copy.setAttribute("xmlns", SVG);
    copy.setAttribute("xml:space", "preserve");
    copy.setAttribute("width", area.w);
    copy.setAttribute("height", area.h);
    copy.setAttribute("viewBox", `${area.x} ${area.y} ${area.w} ${area.h}`);
    const ground = document.createElementNS(SVG, "rect");
    const { x, y, w: width, h: height } = area;
    for (const [name, value] of Object.entries({ x, y, width, height })) ground.setAttribute(name, value);
    ground.setAttribute("fill", getComputedStyle(stage).backgroundColor);
    copy.prepend(ground);
    return { text: new XMLSerializer().serializeToString(copy), area };
  }

  /** The part of the window that has something of the drawing. */
  function shownArea() {
    const { w, h: height } = layoutOf(ROOT);
    const left = Math.floor(clamp(view.x - 24, 0, size.w - 1));
    const top = Math.floor(clamp(view.y - 24, 0, size.h - 1));
    const right = Math.ceil(clamp(view.x + w * view.k + 24, left + 1, size.w));
    const bottom = Math.ceil(clamp(view.y + height * view.k + 24, top + 1, size.h));
    return { x: left, y: top, w: right - left, h: bottom - top };
  }

  function save(blob, ending) {
    const name = String(data.title ?? "").replace(/[^\w.-]+/g, "-").replace(/^[-.]+/, "").slice(0, 80) || "graph";
    const url = URL.createObjectURL(blob);
    h("a", { href: url, download: `${name}.${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  function saveSvg() {
    draw();
    save(new Blob([snapshot().text], { type: "image/svg+xml" }), "svg");
  }

  function savePng() {
    draw();
    const { text, area } = snapshot();
    const url = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    const image = new Image();
    image.addEventListener("load", () => {
      const scale = Math.min(2, 8192 / Math.max(area.w, area.h));
      const canvas = document.createElement("canvas");
      canvas.width = Math.round(area.w * scale);
      canvas.height = Math.round(area.h * scale);
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      URL.revokeObjectURL(url);
      canvas.toBlob((blob) => save(blob, "png"), "image/png");
    });
    image.src = url;
  }

  // ---------------------------------------------------------------- Panel, keys, start

  function showTab(name) {
    for (const tab of ["details", "coverage"]) {
      byId(tab).hidden = tab !== name;
      byId(`${tab}-tab`).setAttribute("aria-selected", String(tab === name));
      byId(`${tab}-tab`).tabIndex = tab === name ? 0 : -1;
    }
    if (name === "coverage") showCoverage();
  }

  function collapse(hidden = !byId("panel").hidden) {
    byId("panel").hidden = byId("divider").hidden = hidden;
    byId("collapse").setAttribute("aria-expanded", String(!hidden));
  }

  function divide(event) {
    if (event.buttons !== 1) return;
    byId("divider").setPointerCapture(event.pointerId);
    byId("panel").style.width = `${clamp(window.innerWidth - event.clientX, 220, window.innerWidth * 0.6)}px`;
  }

  const KEYS = {
    "/": () => byId("search").focus(),
    e: () => selected !== null && toggle(shownAs(selected)),
    E: () => toggle(selected === null ? ROOT : shownAs(selected), true),
    f: fit,
    n: () => goToChange(1),
    p: () => goToChange(-1),
    "+": () => zoom(1.25),
    "=": () => zoom(1.25),
    "-": () => zoom(0.8),
    "?": () => byId("manual").showModal(),
    Escape: () => select(null),
    ArrowUp: () => move("ArrowUp"),
    ArrowDown: () => move("ArrowDown"),
    ArrowLeft: () => move("ArrowLeft"),
    ArrowRight: () => move("ArrowRight"),
    Enter: enter,
  };

  function key(event) {
    if (byId("manual").open || event.ctrlKey || event.metaKey || event.altKey) return;
    const there = event.target;
    if (there.matches("input, select")) {
      if (event.key === "Escape") svg.focus({ preventScroll: true });
      return;
    }
    const elsewhere = there.closest("#panel, header, #legend, #zoom");
    if (elsewhere && (event.key === "Enter" || event.key.startsWith("Arrow"))) return;
    if (!Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  }

  /** Left and right go from tab to tab. */
  function tabKey(event) {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const name = byId("details").hidden ? "details" : "coverage";
    showTab(name);
    byId(`${name}-tab`).focus();
  }

  function captionOf() {
    if (data.show === "before") return data.before ?? "";
    if (data.show === "after") return data.after ?? "";
    return [data.before, data.after].filter((side) => side).join(" → ");
  }

  function listen() {
    svg.addEventListener("pointerdown", pointerDown);
    svg.addEventListener("pointermove", pointerMove);
    svg.addEventListener("pointerup", pointerUp);
    svg.addEventListener("pointercancel", pointerUp);
    svg.addEventListener("wheel", wheel, { passive: false });
    document.addEventListener("keydown", key);
    document.querySelector(".tabs").addEventListener("keydown", tabKey);
    byId("search").addEventListener("input", search);
    byId("search").addEventListener("focus", () => byId("search").value && search());
    byId("search").addEventListener("blur", () => showResults(false));
    byId("search").addEventListener("keydown", searchKey);
    byId("hops").addEventListener("change", (event) => {
      near = event.target.value === "" ? null : nearChanges(Number(event.target.value));
      redraw();
    });
    byId("divider").addEventListener("pointerdown", divide);
    byId("divider").addEventListener("pointermove", divide);
    const acts = {
      next: () => goToChange(1), previous: () => goToChange(-1), in: () => zoom(1.25), out: () => zoom(0.8), fit,
      svg: saveSvg, png: savePng, help: () => byId("manual").showModal(), collapse: () => collapse(),
      "details-tab": () => showTab("details"), "coverage-tab": () => showTab("coverage"),
    };
    for (const [id, act] of Object.entries(acts)) byId(id).addEventListener("click", act);
    new ResizeObserver(() => {
      const middle = size.w / 2;
      measureStage();
      view.x += size.w / 2 - middle; // what was in the middle stays there beside the panel
      showChange();
      redraw();
    }).observe(stage);
  }

  function measureStage() {
    size.w = stage.clientWidth;
    size.h = stage.clientHeight;
  }

  function start() {
    byId("title").textContent = visible(data.title ?? "Graph");
    byId("title").title = visible(data.title ?? "");
    byId("caption").textContent = visible(captionOf());
    if (window.innerWidth < 1000) collapse(true);
    makeLegend();
    showTab("details");
    showChange();
    showDetails();
    measureStage();
    fit();
    if (data.root) reveal(data.root);
    draw();
    performance.mark("viewer:drawn");
    listen();
    requestAnimationFrame(() => setTimeout(() => {
      performance.mark("viewer:painted");
      document.documentElement.dataset.ready = "1";
    }));
  }

  start();

  /** For tests and benchmarks. */
  window.viewer = {
    /** All boxes that are laid out, with their rectangles on the screen. */
    boxes: () => {
      const { left, top } = svg.getBoundingClientRect();
      const found = [];
      const queue = [ROOT];
      for (const group of queue) {
        for (const id of layoutOf(group).ids) {
          const { x, y, w, h: height } = placeOf(id);
          const on = { x: x * view.k + view.x + left, y: y * view.k + view.y + top, w: w * view.k, h: height * view.k };
          found.push({ id, parent: group, open: isOpen(id), dim: isDim(id), ...on });
          if (isOpen(id)) queue.push(id);
        }
      }
      return found;
    },
    state: () => ({ open: [...open], selected, off: [...off], hops: near !== null, view: { ...view }, change: changeAt }),
    toggle,
    reveal,
    select,
    fit,
    zoom,
  };
})();
