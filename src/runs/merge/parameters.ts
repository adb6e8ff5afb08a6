/** A method's parameters, tensor by tensor: weights and settings as they were written, matched with tensors and experts. */
import { RecipeError } from '../../errors.ts';
import type { Parameters, ParameterValues } from '../../methods/merge/merger.ts';
import { type Declared, type RawParameters, resolveParameters } from '../../methods/merge/parameters.ts';
import { matchModules } from '../module-glob.ts';
import type { MergeRecipe } from './recipe.ts';

/** One `--set` or `--weights`, taken apart. */
interface Setting {
  readonly written: string;
  /** Names of the tensors it is for; undefined: all. */
  readonly tensors?: ReadonlySet<string>;
  readonly label?: string;
  readonly name: string;
  readonly value: unknown;
}

/** Yields the checked values of a tensor. Throws RecipeError for settings that name no tensor, expert or parameter, or a wrong value. */
export function parametersOf(
  merger: Declared,
  recipe: MergeRecipe,
  labels: readonly string[],
  tensors: readonly string[],
): (tensor: string) => ParameterValues<Parameters> {
  const settings = [
    ...readWeights(recipe.weights, labels),
    ...recipe.set.map((written) => readSetting(written, labels, tensors)),
  ];
  return (tensor) => {
    const shared: Record<string, unknown> = {};
    const byExpert: Record<string, Record<string, unknown>> = {};
    for (const { tensors: only, label, name, value } of settings) {
      if (only && !only.has(tensor)) continue;
      if (label === undefined) {
        shared[name] = value;
        // The last match wins: what an earlier setting said of one expert is overruled.
        for (const own of Object.values(byExpert)) delete own[name];
      } else {
        byExpert[label] = { ...byExpert[label], [name]: value };
      }
    }
    return resolveParameters(merger, { shared, byExpert } satisfies RawParameters, labels, recipe.preset);
  };
}

function readWeights(weights: readonly string[], labels: readonly string[]): Setting[] {
  const written = `--weights ${weights.join(',')}`;
  const items = weights.flatMap((item) => item.split(','));
  if (items.length === 0) return [];
  const named = items.filter((item) => item.includes('='));
  if (named.length === 0) {
    if (items.length !== 1 && items.length !== labels.length) {
      throw new RecipeError(`${written}: ${items.length} weights for ${labels.length} experts (${labels.join(', ')})`);
    }
    return [{ written, name: 'weight', value: items.length === 1 ? items[0] : items }];
  }
  return items.map((item) => {
    const at = item.lastIndexOf('=');
    const label = item.slice(0, Math.max(at, 0));
    if (!labels.includes(label)) {
      throw new RecipeError(`${written}: "${item}" should be label=weight; the experts are ${labels.join(', ')}`);
    }
    return { written, label, name: 'weight', value: item.slice(at + 1) };
  });
}

/** `[glob:][label.]name=value`. Labels may have dots, and names of parameters have none. */
function readSetting(written: string, labels: readonly string[], tensors: readonly string[]): Setting {
  const at = written.indexOf('=');
  if (at < 1) throw new RecipeError(`--set ${written}: [glob:][label.]name=value is expected`);
  const [target, value] = [written.slice(0, at), written.slice(at + 1)];
  const colon = target.lastIndexOf(':');
  const path = target.slice(colon + 1);
  const dot = path.lastIndexOf('.');
  const [label, name] = [path.slice(0, Math.max(dot, 0)), path.slice(dot + 1)];
  if (dot >= 0 && !labels.includes(label)) {
    throw new RecipeError(`--set ${written}: there is no expert "${label}"; the experts are ${labels.join(', ')}`);
  }
  return {
    written,
    ...(colon < 0 ? {} : { tensors: matchModules('--set', [target.slice(0, colon)], tensors) }),
    ...(dot < 0 ? {} : { label }),
    name,
    value,
  };
}
