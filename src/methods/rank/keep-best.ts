/** Components of all layers against each other for one budget: the best for their cost are kept, ties by layer and position. */

export interface Component<Layer extends { readonly name: string }> {
  readonly layer: Layer;
  /** Its place among those of the layer. */
  readonly k: number;
  readonly cost: number;
  readonly value: number;
}

/** Places that are kept, ascending, by layer; a component that does not fit is passed over. Never costs more than `allowed`. */
export function keepBest<Layer extends { readonly name: string }>(
  components: readonly Component<Layer>[],
  allowed: number,
): ReadonlyMap<string, readonly number[]> {
  const sorted = components.toSorted(
    (a, b) =>
      b.value / b.cost - a.value / a.cost || (a.layer.name < b.layer.name ? -1 : a.layer.name > b.layer.name ? 1 : a.k - b.k),
  );
  const kept = new Map<string, number[]>(components.map(({ layer }) => [layer.name, []]));
  let spent = 0;
  for (const { layer, k, cost } of sorted) {
    if (spent + cost > allowed) continue;
    spent += cost;
    kept.get(layer.name)!.push(k);
  }
  for (const own of kept.values()) own.sort((a, b) => a - b);
  return kept;
}
