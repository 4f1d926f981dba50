// Vercel's AI SDK with both of its OpenAI providers against the server in HEADRACE_URL.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, generateObject, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { ask, hello, key, model, url, Wheel } from "./common.mjs";

const baseURL = `${url}/v1`;
const openai = createOpenAI({ baseURL, apiKey: key });
const compatible = createOpenAICompatible({
  name: "headrace", baseURL, apiKey: key, includeUsage: true, supportsStructuredOutputs: true,
});
const models = {
  "openai-compatible": compatible(model),
  "openai chat": openai.chat(model),
  "openai responses": openai.responses(model),
};
const weather = tool({
  description: "Get the current weather of a city",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => ({ temperature: 21, sky: "sunny" }),
});

for (const [name, model] of Object.entries(models)) {
  const common = { model, maxRetries: 0, temperature: 0 };

  test(`${name}: streamText`, async () => {
    const result = streamText({ ...common, messages: hello, maxOutputTokens: 24 });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    const whole = await generateText({ ...common, messages: hello, maxOutputTokens: 24 });
    assert.equal(text, whole.text);
    assert.ok(text);
    assert.equal((await result.usage).outputTokens, whole.usage.outputTokens);
    assert.ok(whole.usage.inputTokens > 0);
  });

  test(`${name}: tools`, async () => {
    const tools = { get_weather: weather };
    const result = streamText({ ...common, messages: ask, tools, stopWhen: stepCountIs(3) });
    await result.consumeStream({ onError: (error) => { throw error; } });
    const steps = await result.steps;
    assert.deepEqual(steps[0].toolCalls.map((call) => call.input), [{ city: "Rome" }]);
    assert.equal(steps[0].finishReason, "tool-calls");
    assert.match(await result.text, /21/);
    const forced = await generateText({ ...common, messages: hello, tools, toolChoice: "required" });
    assert.equal(typeof forced.toolCalls[0].input.city, "string");
  });

  test(`${name}: objects`, async () => {
    const options = { ...common, messages: hello, temperature: 1.2, seed: 3, maxOutputTokens: 400 };
    const { object } = await generateObject({ ...options, schema: Wheel });
    assert.ok(Wheel.parse(object));
    const stream = streamObject({ ...options, schema: Wheel });
    for await (const part of stream.partialObjectStream) assert.equal(typeof part, "object");
    assert.ok(Wheel.parse(await stream.object));
    const { output } = await generateText({ ...options, output: Output.object({ schema: Wheel }) });
    assert.ok(Wheel.parse(output));
  });
}
