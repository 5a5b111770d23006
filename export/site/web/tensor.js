// Tensors as plain data, {data: typed array, shape: numbers}, and the few operations on them that a run needs.

/** How many elements a shape has. */
export function count(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

/** A tensor; its data must fill its shape. */
export function tensor(data, shape) {
  if (data.length !== count(shape)) {
    throw new Error(`a tensor of ${data.length} elements cannot have the shape (${shape.join(", ")})`);
  }
  return { data, shape };
}

/** Zeros of a shape, float32. */
export function zeros(shape) {
  return tensor(new Float32Array(count(shape)), shape);
}

/** Join tensors of one type along an axis; all other sizes are equal. */
export function concat(tensors, axis) {
  const first = tensors[0];
  const at = axis < 0 ? first.shape.length + axis : axis;
  for (const other of tensors) {
    if (other.shape.length !== first.shape.length || other.shape.some((size, d) => d !== at && size !== first.shape[d])) {
      throw new Error(`shapes (${first.shape.join(", ")}) and (${other.shape.join(", ")}) cannot be joined along axis ${at}`);
    }
  }
  const shape = [...first.shape];
  shape[at] = tensors.reduce((sum, each) => sum + each.shape[at], 0);
  const outer = count(shape.slice(0, at));
  const joined = new first.data.constructor(count(shape));
  let to = 0;
  for (let row = 0; row < outer; row += 1) {
    for (const each of tensors) {
      const length = each.data.length / outer;
      joined.set(each.data.subarray(row * length, (row + 1) * length), to);
      to += length;
    }
  }
  return tensor(joined, shape);
}

/** The same tensor with zeros after the end of its last axis. */
export function padLast(value, width) {
  const last = value.shape.at(-1);
  if (width < last) {
    throw new Error(`a width of ${last} cannot be padded to ${width}`);
  }
  const missing = [...value.shape.slice(0, -1), width - last];
  return width === last ? value : concat([value, zeros(missing)], -1);
}

/** One half of a tensor of two along its first axis, without copying. */
export function half(value, which) {
  const length = value.data.length / 2;
  return tensor(value.data.subarray(which * length, (which + 1) * length), [1, ...value.shape.slice(1)]);
}

/** Element by element, rounded to float32: `f` of numbers. */
export function map2(first, second, f) {
  if (first.data.length !== second.data.length) {
    throw new Error(`shapes (${first.shape.join(", ")}) and (${second.shape.join(", ")}) do not match`);
  }
  const data = new Float32Array(first.data.length);
  for (let at = 0; at < data.length; at += 1) {
    data[at] = f(first.data[at], second.data[at]);
  }
  return tensor(data, first.shape);
}
