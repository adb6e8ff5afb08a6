/** `--set lambda=auto`: what it asks for, and the recipe that each lambda stands for. */
import { RecipeError } from '../../errors.ts';
import { methodsWithLambda, SEARCH_PARAMETERS } from '../../methods/merge/lambda-search.ts';
import { LEARNED, type TextValues } from '../../methods/merge/learned.ts';
import type { Declared } from '../../methods/merge/parameters.ts';
import { parametersOf } from './parameters.ts';
import type { MergeRecipe } from './recipe.ts';

export interface LambdaRequest {
  readonly values: TextValues;
  /** The same recipe with that lambda: nothing in it is left to be found. */
  readonly at: (lambda: number) => MergeRecipe;
}

/** Whether lambda is to be found on text. Throws RecipeError where it cannot be, or is given as well. */
export function asksForLambda({ method, set }: Pick<MergeRecipe, 'method' | 'set'>): boolean {
  const given = set.filter((written) => isLambda(method, written));
  const auto = given.find((written) => settingValue(written) === 'auto');
  if (auto === undefined) return false;
  const methods = methodsWithLambda();
  if (Object.hasOwn(LEARNED, method))
    throw new RecipeError(`--set ${auto}: ${method} has no lambda to be found; it learns how much of each expert to take`);
  if (!methods.includes(method))
    throw new RecipeError(`--set ${auto}: ${method} has no lambda that can be found; ${methods.join(', ')} have`);
  if (/[:.]/.test(targetOf(auto)))
    throw new RecipeError(`--set ${auto}: one lambda is found, for all tensors and experts at once`);
  const other = given.find((written) => written !== auto);
  if (other !== undefined)
    throw new RecipeError(`--set ${other}: has no place beside ${auto}, which finds one lambda for all tensors`);
  return true;
}

/** What the search is to be like; undefined where lambda is given. */
export function lambdaRequest(recipe: MergeRecipe): LambdaRequest | undefined {
  if (!asksForLambda(recipe)) return undefined;
  const { method, set } = recipe;
  const ofSearch = set.filter((written) => Object.hasOwn(SEARCH_PARAMETERS, snake(targetOf(written))));
  const declared: Declared = { name: `${method} with lambda=auto`, parameters: SEARCH_PARAMETERS };
  const values = parametersOf(declared, { ...recipe, weights: [], set: ofSearch }, [], [])('');
  const others = set.filter((written) => !ofSearch.includes(written));
  const at = (lambda: number): MergeRecipe => ({
    ...recipe,
    set: others.map((written) => (isLambda(method, written) ? `${targetOf(written)}=${lambda}` : written)),
  });
  return { values: values as TextValues, at };
}

/** mergekit's spelling, with the method in front, is the same parameter. */
function isLambda(method: string, written: string): boolean {
  const name = snake(targetOf(written).replace(/^.*[:.]/, ''));
  return name === 'lambda' || name === `${snake(method)}_lambda`;
}

function targetOf(written: string): string {
  return written.slice(0, Math.max(0, written.indexOf('=')));
}

function settingValue(written: string): string {
  return written.slice(written.indexOf('=') + 1);
}

function snake(name: string): string {
  return name.replaceAll('-', '_');
}
