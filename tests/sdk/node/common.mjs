// What both suites ask: the server is in HEADRACE_URL, with the demo model.

import { z } from "zod";

export const url = process.env.HEADRACE_URL;
export const key = process.env.HEADRACE_KEY;
export const model = "headrace-demo";
export const hello = [{ role: "user", content: "Hello! How are you?" }];
export const ask = [{ role: "user", content: "What is the weather in Rome?" }];
export const Wheel = z.object({
  name: z.string().max(12),
  kind: z.enum(["overshot", "undershot"]),
  parts: z.array(z.object({ label: z.string().max(10), count: z.int().min(0).max(99) })).max(2),
});
