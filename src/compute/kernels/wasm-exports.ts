/** What the WASM module of the kernels exports: addresses are bytes of its memory, counts whole numbers. Its source is in `assembly/`. */
export interface KernelExports {
  readonly memory: { readonly buffer: ArrayBuffer; grow(pages: number): number };
  memoryStart(): number;
  minMaxGrid(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    levels: number,
    symmetric: number,
    scale: number,
    shift: number,
  ): void;
  twoLevelGrid(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    symmetric: number,
    scale: number,
    shift: number,
  ): void;
  searchGrid(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    levels: number,
    scale: number,
    zero: number,
    scratch: number,
  ): void;
  searchWeightedGrid(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    levels: number,
    scale: number,
    zero: number,
    weights: number,
    scratch: number,
  ): void;
  roundCodes(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    levels: number,
    scale: number,
    shift: number,
    codes: number,
  ): void;
  compensate(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    upper: number,
    levels: number,
    gridStride: number,
    scale: number,
    shift: number,
    codes: number,
    errors: number,
  ): void;
  fitWeighted(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    levels: number,
    weights: number,
    scale: number,
    zero: number,
    loss: number,
    scratch: number,
  ): void;
  fitTwoLevels(
    group: number,
    columns: number,
    stride: number,
    rows: number,
    weights: number,
    scale: number,
    offset: number,
    loss: number,
  ): void;
  polish(
    decoded: number,
    gradient: number,
    columns: number,
    stride: number,
    rows: number,
    hessian: number,
    levels: number,
    scale: number,
    shift: number,
    codes: number,
    changes: number,
  ): void;
}
