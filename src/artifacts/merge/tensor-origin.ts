/** Where one input's version of a tensor comes from, as plain data: a worker gets it by message. */

/**
 * - `stored`: the input's own tensor of that name.
 * - `base`: the base's values; a task vector of zero.
 * - `low-rank`: task vector `scale * B A`, of factors `a` (rank, in) and `b` (out, rank); `e` (rank, 1) multiplies the rows of A.
 *   `transposed`: the tensor is stored (in, out). `magnitude` (out): DoRA, each output row of `base + B A` gets that length.
 * - `added`: task vector `scale * tensor`.
 */
export type TensorOrigin =
  | { readonly kind: 'stored'; readonly name: string }
  | { readonly kind: 'base' }
  | {
      readonly kind: 'low-rank';
      readonly a: string;
      readonly b: string;
      readonly e?: string;
      readonly scale: number;
      readonly transposed: boolean;
      readonly magnitude?: string;
    }
  | { readonly kind: 'added'; readonly name: string; readonly scale: number };
