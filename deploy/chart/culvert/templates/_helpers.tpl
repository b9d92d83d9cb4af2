{{/* Of everything; selectors have only the first, which never changes. */}}
{{- define "culvert.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: culvert
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- define "culvert.image" -}}
{{ .root.Values.image.prefix }}{{ .name }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "culvert.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* What `helm uninstall` does first, in the order of this weight. What a former try has left is replaced. */}}
{{- define "culvert.uninstallHook" -}}
helm.sh/hook: pre-delete
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* By it the CNI plugin decides while no agent answers. Where it outlives a reboot: Pods of the mesh that are started before their
agent would be let through in clear by a plugin that knows nothing. Runtimes read no file there that ends like this. */}}
{{- define "culvert.namespaceList" -}}
{{ .Values.cni.confDir }}/culvert-namespaces
{{- end }}
