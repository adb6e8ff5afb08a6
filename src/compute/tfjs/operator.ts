/** What an operator of the interpreter is, and what it may ask of the node it runs. */
import type { Node } from '../../../formats/onnx/model.ts';
import { UnsupportedError } from '../../errors.ts';
import type { Tf, TfTensor, TfValue } from './values.ts';

/**
 * One ONNX operator: values in, values out, as many as the node names; an optional output that nobody asks for may be left out.
 * Runs inside `tf.tidy`: what it makes besides its results is freed.
 */
export type Operator = (call: Call) => readonly (TfValue | undefined)[];

/** A node about to run. */
export class Call {
  readonly tf: Tf;
  readonly node: Node;
  readonly #inputs: readonly (TfValue | undefined)[];

  constructor(tf: Tf, node: Node, inputs: readonly (TfValue | undefined)[]) {
    this.tf = tf;
    this.node = node;
    this.#inputs = inputs;
  }

  /** Whether the optional input is there. */
  has(index: number): boolean {
    return this.#inputs[index] !== undefined;
  }

  input(index: number): TfValue {
    const value = this.#inputs[index];
    if (value === undefined) throw new Error(`${this.#subject}: input ${index} is missing`);
    return value;
  }

  inputs(): TfValue[] {
    return this.node.inputs.map((_, index) => this.input(index));
  }

  tensor(index: number): TfTensor {
    return this.input(index).tensor;
  }

  /** A small integer input as host numbers: a shape, axes, bounds. */
  numbers(index: number): number[] {
    return Array.from(this.tensor(index).dataSync());
  }

  int(name: string, otherwise: number): number {
    const attribute = this.node.attributes[name];
    return attribute?.kind === 'int' ? Number(attribute.value) : otherwise;
  }

  ints(name: string): number[] | undefined {
    const attribute = this.node.attributes[name];
    return attribute?.kind === 'ints' ? attribute.value.map(Number) : undefined;
  }

  float(name: string, otherwise: number): number {
    const attribute = this.node.attributes[name];
    return attribute?.kind === 'float' ? attribute.value : otherwise;
  }

  text(name: string, otherwise: string): string {
    const attribute = this.node.attributes[name];
    return attribute?.kind === 'string' ? attribute.value : otherwise;
  }

  /** A place among `rank` axes, counted from the end when negative. */
  axis(axis: number, rank: number): number {
    return axis < 0 ? axis + rank : axis;
  }

  /** Refuses what the interpreter has no words for. */
  refuse(what: string): never {
    throw new UnsupportedError(`${this.#subject}: the tfjs engine has no ${what}`);
  }

  get #subject(): string {
    return `${this.node.op} "${this.node.name}"`;
  }
}
