/**
 * Sums in float64, each in the order of the elements: what is fast is that several go side by side. `sumsAt` holds one float64 a sum, which is added to.
 */

// @ts-ignore: decorator
@inline
function at(xAt: usize, i: usize): f64 {
  return <f64>load<f32>(xAt + i);
}

/** Of |x|. */
export function sumMagnitudes(xAt: usize, n: i32, sumsAt: usize): void {
  let sum = load<f64>(sumsAt);
  for (let i: usize = 0; i < <usize>n << 2; i += 4) sum += abs(at(xAt, i));
  store<f64>(sumsAt, sum);
}

/** Of |x| and of |y|. */
export function sumMagnitudePairs(xAt: usize, yAt: usize, n: i32, sumsAt: usize): void {
  let x = load<f64>(sumsAt);
  let y = load<f64>(sumsAt, 8);
  for (let i: usize = 0; i < <usize>n << 2; i += 4) {
    x += abs(at(xAt, i));
    y += abs(at(yAt, i));
  }
  store<f64>(sumsAt, x);
  store<f64>(sumsAt, y, 8);
}

/** Of `x y`. */
export function sumProducts(xAt: usize, yAt: usize, n: i32, sumsAt: usize): void {
  let sum = load<f64>(sumsAt);
  for (let i: usize = 0; i < <usize>n << 2; i += 4) sum += at(xAt, i) * at(yAt, i);
  store<f64>(sumsAt, sum);
}

/** Of `x x`, `y x` and `y y`. */
export function sumGram(xAt: usize, yAt: usize, n: i32, sumsAt: usize): void {
  let xx = load<f64>(sumsAt);
  let yx = load<f64>(sumsAt, 8);
  let yy = load<f64>(sumsAt, 16);
  for (let i: usize = 0; i < <usize>n << 2; i += 4) {
    const x = at(xAt, i);
    const y = at(yAt, i);
    xx += x * x;
    yx += y * x;
    yy += y * y;
  }
  store<f64>(sumsAt, xx);
  store<f64>(sumsAt, yx, 8);
  store<f64>(sumsAt, yy, 16);
}
